"""Fits of the over-optimisation law: coefficients and peaks found again, intervals, what is refused, what is said."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from command_line import rlhf

from rlhf.eval.overoptimisation import Curve, LawName, Start, Track, fit_curve
from rlhf.eval.overoptimisation_report import cautions, numbers, verdict
from rlhf.infra.config import load_config, to_yaml
from rlhf.infra.errors import UserError
from rlhf.recipes.grpo_config import GRPOConfig
from rlhf.recipes.overoptimize_sources import Columns, find_points, pool_track
from rlhf.recipes.ppo import run_ppo
from rlhf.recipes.ppo_config import PPOConfig

KL = np.array([0.0, 0.1, 0.4, 0.9, 1.6, 2.5, 4.0, 6.0, 9.0, 12.0])


def on_law(law: str, kl: np.ndarray, alpha: float, beta: float, level: float = 0.0) -> np.ndarray:
    d = np.sqrt(kl)
    bend = d if law == "best_of_n" else np.log(np.where(d > 0, d, 1.0))
    return level + d * (alpha - beta * bend)


def curve(law: LawName, start: Start, *levels: float, noise: float = 0.0, seed: int = 0, beta: float = 0.2) -> Curve:
    rng = np.random.default_rng(seed)
    tracks = []
    for number, level in enumerate(levels):
        gold = on_law(law, KL, 0.5, beta, level) + rng.normal(0, 1, len(KL)) * noise
        tracks.append(Track(f"run {number}", KL, gold, on_law(law, KL, 0.9, 0.1, -level)))
    return Curve("a curve", law, start, tuple(tracks))


@pytest.mark.parametrize("law", ["rl", "best_of_n"])
@pytest.mark.parametrize("start", ["fitted", "measured"])
def test_points_on_the_law_are_found_whatever_level_each_run_starts_from(law: LawName, start: Start) -> None:
    found = fit_curve(curve(law, start, 0.3, 0.5, 0.1), num_resamples=200)
    assert (found.gold.alpha.estimate, found.gold.beta.estimate) == pytest.approx((0.5, 0.2))
    assert (found.proxy.alpha.estimate, found.proxy.beta.estimate) == pytest.approx((0.9, 0.1))
    assert found.gold.levels_S.tolist() == pytest.approx([0.3, 0.5, 0.1])
    assert found.gold.start.estimate == pytest.approx(0.3)
    assert found.gold.r_squared == pytest.approx(1) and found.gold.residual_std < 1e-9 < found.gold.other_residual_std
    # Every resample lies on the law too, so the intervals are points.
    assert (found.gold.alpha.low, found.gold.alpha.high) == pytest.approx((0.5, 0.5))
    d = {"best_of_n": 0.5 / 0.4, "rl": math.exp(0.5 / 0.2 - 1)}[law]
    assert found.gold.peak_kl.estimate == pytest.approx(d * d)
    top = 0.3 + {"best_of_n": 0.25 / 0.8, "rl": 0.2 * d}[law]
    if law == "best_of_n":
        assert found.gold.best.estimate == pytest.approx(top) and found.gold.share_inside == 1
        assert found.gold.lost.estimate == pytest.approx(top - on_law(law, KL, 0.5, 0.2, 0.3)[-1])
        assert "gold is highest at a KL of 1.56 [1.56, 1.56]" in verdict(found)
    else:  # KL 20 is beyond the data
        assert found.gold.best.estimate == pytest.approx(on_law(law, KL, 0.5, 0.2, 0.3)[-1])
        assert "no peak in the measured range, up to a KL of 12; the curve would turn at 20.0" in verdict(found)
    assert [(one.alpha, one.beta) for one in found.gold.tracks if one] == [pytest.approx((0.5, 0.2))] * 3


def test_levels_and_coefficients_are_those_of_least_squares_with_a_column_for_each_run() -> None:
    noisy = curve("rl", "fitted", 0.3, 0.6, noise=0.05)
    found = fit_curve(noisy, num_resamples=200).gold
    d = np.sqrt(np.tile(KL, 2))
    first = np.repeat([1.0, 0.0], len(KL))
    design = np.stack((d, -d * np.log(np.where(d > 0, d, 1)), first, 1 - first), axis=1)
    gold = np.concatenate([track.gold_M for track in noisy.tracks])
    by_hand, squares, *_ = np.linalg.lstsq(design, gold, rcond=None)
    assert [found.alpha.estimate, found.beta.estimate, *found.levels_S] == pytest.approx(by_hand.tolist())
    assert found.residual_std == pytest.approx(math.sqrt(float(squares[0]) / (len(gold) - 4)))


def test_runs_are_drawn_whole() -> None:
    """With two runs there are four draws: (0, 0), (0, 1), (1, 0), (1, 1), so three different fits."""
    found = fit_curve(curve("best_of_n", "fitted", 0.3, 0.6, noise=0.05), num_resamples=400).gold
    alone = sorted(one.alpha for one in found.tracks if one is not None)
    assert (found.alpha.low, found.alpha.high) == pytest.approx(tuple(alone))
    assert found.resampled == "runs"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fitted", "measured"])
def test_intervals_of_one_run_hold_the_truth_about_as_often_as_they_say(start: Start) -> None:
    held = 0
    for seed in range(60):
        one = curve("best_of_n", start, 0.3, noise=0.02, seed=seed)
        if start == "measured":  # the start itself is taken as it was measured
            one.tracks[0].gold_M[0] = 0.3
        alpha = fit_curve(one, seed, num_resamples=300).gold.alpha
        held += alpha.low <= 0.5 <= alpha.high
    # Ten points a run, blocks of two: percentile intervals are somewhat short.
    assert held >= 42


def test_prompts_of_a_pool_are_drawn_anew() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(60, 16))
    gold = 0.6 * scores + rng.normal(size=(60, 16))
    track = pool_track("pool", scores.tolist(), gold.tolist())
    found = fit_curve(Curve("pool", "best_of_n", "measured", (track,)), num_resamples=2000).gold
    assert found.resampled == "prompts" and track.kl_by_ties == pytest.approx(0)
    assert track.gold_KM is not None
    d = np.sqrt(track.kl_M)
    design = np.stack((d, -d * d), axis=1)
    each_L = np.linalg.lstsq(design, (track.gold_KM - track.gold_KM[:, :1]).T, rcond=None)[0]
    assert found.alpha.estimate == pytest.approx(each_L[0].mean())
    half = 1.96 * each_L[0].std(ddof=1) / math.sqrt(60)
    assert found.alpha.high - found.alpha.low == pytest.approx(2 * half, rel=0.1)


def test_a_pool_has_the_points_of_all_ways_of_drawing() -> None:
    scores, gold = [[0.1, 0.9, 0.5]], [[3.0, 6.0, 0.0]]
    track = pool_track("pool", scores, gold)
    assert track.kl_M.tolist() == pytest.approx([0, math.log(2) - 0.5, math.log(3) - 2 / 3])
    for place, n in enumerate((1, 2, 3)):
        drawn = list(combinations(range(3), n))
        best = [max(some, key=lambda i: scores[0][i]) for some in drawn]
        assert track.gold_M[place] == pytest.approx(sum(gold[0][i] for i in best) / len(best))
        assert track.proxy_M[place] == pytest.approx(sum(scores[0][i] for i in best) / len(best))


def test_what_cannot_be_fitted_is_refused() -> None:
    still = Track("run", np.zeros(8), KL[:8], KL[:8])
    with pytest.raises(UserError, match="KL is 0 at every one of 8 points"):
        fit_curve(Curve("c", "rl", "fitted", (still,)))
    few = Track("run", KL[:4], KL[:4], KL[:4])
    with pytest.raises(UserError, match="got 3 points at different KLs above 0, expected at least 5"):
        fit_curve(Curve("c", "rl", "fitted", (few,)))
    late = Track("run", KL[1:], KL[1:], KL[1:])
    with pytest.raises(UserError, match=r"no point at KL 0 \(the smallest is 0.1\)"):
        fit_curve(Curve("c", "rl", "measured", (late,)))
    uneven = [[0.1, 0.2], [0.3]]
    with pytest.raises(UserError, match="different numbers of answers"):
        pool_track("p", uneven, uneven)
    with pytest.raises(UserError, match="no finite numbers"):
        pool_track("p", [[0.1, math.nan]], [[0.1, 0.2]])


def test_a_gold_that_never_turns_and_one_that_only_falls_are_told() -> None:
    rising = fit_curve(curve("best_of_n", "fitted", 0.3, beta=-0.05), num_resamples=200)
    assert "the fitted curve has no maximum" in verdict(rising)
    assert numbers(rising)["gold"]["peak_kl"]["estimate"] is None and not numbers(rising)["gold"]["peak_in_range"]
    track = Track("run", KL, 0.5 - 0.1 * KL, KL)
    falling = fit_curve(Curve("c", "best_of_n", "fitted", (track,)), num_resamples=200)
    assert "falls from the start on, by 1.200" in verdict(falling)
    json.dumps(numbers(falling), allow_nan=False)


def test_doubts_are_told() -> None:
    rng = np.random.default_rng(1)
    noise = Track("run", np.array([-0.2, *KL[1:8]]), rng.normal(size=8), KL[:8], num_left_out=2, kl_by_ties=0.4)
    said = " ".join(cautions(fit_curve(Curve("c", "rl", "fitted", (noise,)), num_resamples=400)))
    for words in (
        "only 7 points",
        "one run: the intervals",
        "explains little",
        "holds 0",
        "2 rows of 'run'",
        "0.40 nats off",
    ):
        assert words in said
    assert "1 estimates of KL lie below 0" in said
    straight = fit_curve(curve("rl", "fitted", 0.3, 0.4, noise=0.001), num_resamples=400)
    assert "2 runs are few" in " ".join(cautions(straight))
    # Points of the one law, fitted with the other.
    track = Track("run", KL, on_law("best_of_n", KL, 0.5, 0.2), KL)
    wrong = fit_curve(Curve("c", "rl", "fitted", (track,)), num_resamples=200)
    assert any("the other form fits better" in sentence for sentence in cautions(wrong))
    right = fit_curve(Curve("c", "best_of_n", "fitted", (track,)), num_resamples=200)
    assert not any("the other form" in sentence for sentence in cautions(right))


def test_files_of_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("seed,nats,truth,proxy\n0,0,0.5,0\n0,1,0.7,1\n1,0,0.4,0\n1,2,nan,1\n1,3,0.9,2\n", encoding="utf-8")
    found = find_points(str(path), Columns(kl="nats", gold="truth"), None, tmp_path)
    assert [track.name for track in found.tracks] == ["seed 0", "seed 1"] and found.law is None
    assert found.tracks[1].gold_M.tolist() == [0.4, 0.9] and found.tracks[1].num_left_out == 1
    assert found.files == [path]
    assert find_points(str(path), Columns("nats", "truth"), 0.5, tmp_path).tracks[0].kl_M.tolist() == [0]
    with pytest.raises(UserError, match=r"no column .kl.; it has seed, nats"):
        find_points(str(path), Columns(gold="truth"), None, tmp_path)
    with pytest.raises(UserError, match=r"no point up to max_kl=0\.5; its smallest KL is 1"):
        path.write_text("kl,gold,proxy\n1,1,1\n", encoding="utf-8")
        find_points(str(path), Columns(), 0.5, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find_points(str(tmp_path / "no.csv"), Columns(), None, tmp_path)
    path.write_text("kl,gold,proxy\n1,high,1\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds 'high' in the column 'gold'"):
        find_points(str(path), Columns(), None, tmp_path)


def write_run(folder: Path, recipe: str, rewards: str, gold: str | None, *, level: float = 0.4, seed: int = 0) -> Path:
    """A run folder as training leaves it, whose log lies on RL's law but for some noise."""
    cls = {"ppo": PPOConfig, "grpo": GRPOConfig}[recipe]
    config = load_config(cls, overrides=[f"run.name={folder.name}", f"rewards={rewards}", "reward_model=some"])
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"recipe": recipe, "status": "finished"}), encoding="utf-8")
    rng = np.random.default_rng(seed)
    golds = on_law("rl", KL, 0.5, 0.3, level) + rng.normal(0, 0.005, len(KL))
    rows = [{"step": n + 1, "kl/mean": kl, "reward/mean": n / 10} for n, kl in enumerate(KL.tolist())]
    rows = [row | ({} if gold is None else {gold: value}) for row, value in zip(rows, golds.tolist(), strict=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "logs" / "train.jsonl").write_text(text, encoding="utf-8")
    return folder


WITH_GOLD = "[{name: model}, {name: gold, model: another, weight: 0}]"


def test_the_term_that_pays_nothing_is_gold(tmp_path: Path) -> None:
    write_run(tmp_path / "ppo", "ppo", WITH_GOLD, "reward/term/gold")
    found = find_points("ppo", Columns(), None, tmp_path)
    assert found.law == "rl" and found.files == [tmp_path / "ppo" / "logs" / "train.jsonl"]
    assert found.tracks[0].kl_M.tolist() == KL.tolist() and found.tracks[0].proxy_M[3] == pytest.approx(0.3)
    for gold in ("gold", "reward/term/gold", "reward/mean"):
        assert len(find_points(str(tmp_path / "ppo"), Columns(gold=gold), None, tmp_path).tracks[0].gold_M) == len(KL)
    with pytest.raises(
        UserError, match=r"no 'reward/term/help' to take the gold from; it has kl/mean, reward/mean, rew"
    ):
        find_points("ppo", Columns(gold="help"), None, tmp_path)
    two = "[{name: model}, {name: gold, model: a, weight: 0}, {name: silver, model: b, weight: 0}]"
    write_run(tmp_path / "grpo", "grpo", two, "reward/term/gold")
    with pytest.raises(UserError, match="several terms of weight 0, gold, silver; say gold="):
        find_points("grpo", Columns(), None, tmp_path)


def test_gold_is_taken_from_the_watch_where_no_term_was_logged(tmp_path: Path) -> None:
    write_run(tmp_path / "bare", "ppo", "[{name: model}]", None)
    with pytest.raises(UserError, match="'bare' has no gold beside its reward"):
        find_points("bare", Columns(), None, tmp_path)
    looks = [{"step": n, "figures": {k: {"mean": n / 4} for k in ("kl", "gold", "reward")}} for n in range(4)]
    looks.append({"step": 4, "figures": {"kl": {"mean": 1.0}}})
    (tmp_path / "bare" / "hacking.json").write_text(json.dumps({"looks": looks}), encoding="utf-8")
    found = find_points("bare", Columns(), None, tmp_path)
    assert found.tracks[0].kl_M.tolist() == [0, 0.25, 0.5, 0.75] and found.files[0].name == "hacking.json"
    for recipe, words in (("sft", "was made by 'sft', of which no curve"), ("best_of_n", "no finished pool")):
        (tmp_path / "bare" / "run.json").write_text(json.dumps({"recipe": recipe}), encoding="utf-8")
        with pytest.raises(UserError, match=words):
            find_points("bare", Columns(), None, tmp_path)
    (tmp_path / "bare" / "pool.jsonl").write_text(json.dumps({"scores": [1, 2]}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="measured by nothing but the reward that chose"):
        find_points("bare", Columns(), None, tmp_path)
    with pytest.raises(UserError, match="leave kl, gold and proxy out"):
        find_points("bare", Columns(kl="a"), None, tmp_path)


@pytest.mark.slow
def test_the_verb_on_runs_a_pool_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        write_run(tmp_path / f"ppo_{seed}", "ppo", WITH_GOLD, "reward/term/gold", level=0.4 + seed / 10, seed=seed)
    write_run(tmp_path / "best", "ppo", WITH_GOLD, None)
    (tmp_path / "best" / "run.json").write_text(json.dumps({"recipe": "best_of_n"}), encoding="utf-8")
    rng = np.random.default_rng(0)
    rows = [{"scores": row.tolist(), "worths": (0.5 * row).tolist()} for row in rng.normal(size=(40, 32))]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "best" / "pool.jsonl").write_text(text, encoding="utf-8")
    csv = tmp_path / "mine.csv"
    gold = on_law("best_of_n", KL, 0.6, 0.1)
    csv.write_text(
        "kl,gold,proxy\n" + "".join(f"{a},{b},{b}\n" for a, b in zip(KL, gold, strict=True)), encoding="utf-8"
    )
    place = [f"run.output_dir={tmp_path}", "run.device=cpu", "run.num_threads=1", "num_resamples=300"]
    three = f"{{name: RL, sources: [ppo_0, ppo_1, ppo_2]}}, {{sources: best}}, {{sources: '{csv}', law: best_of_n}}"
    assert rlhf("overoptimize", "run.name=a", *place, f"curves=[{three}]") == 0
    shown = capsys.readouterr().out
    assert "RL: gold is highest at a KL of 3." in shown
    assert "best: no peak in the measured range" in shown and "mine: gold is highest at a KL of 9.00" in shown
    folder = tmp_path / "a"
    found = json.loads((folder / "overoptimisation.json").read_text(encoding="utf-8"))
    by_name = {one["name"]: one for one in found["curves"]}
    assert by_name["RL"]["gold"]["alpha"]["estimate"] == pytest.approx(0.5, abs=0.02)
    assert by_name["RL"]["gold"]["peak_kl"]["estimate"] == pytest.approx(math.exp(2 * (0.5 / 0.3 - 1)), rel=0.1)
    assert by_name["RL"]["gold"]["resampled"] == "runs" and len(by_name["RL"]["gold"]["runs"]) == 3
    assert by_name["mine"]["gold"]["beta"]["estimate"] == pytest.approx(0.1) and by_name["mine"]["start"] == "measured"
    assert by_name["best"]["gold"]["resampled"] == "prompts" and by_name["best"]["sources"][0]["points"] == 10
    report = (folder / "OVEROPTIMISATION.md").read_text(encoding="utf-8")
    for words in (
        "## What to be wary of",
        "| RL, gold |",
        "| RL: ppo\\_1 |",
        "3 runs are few",
        "(overoptimisation.png)",
    ):
        assert words in report
    assert (folder / "overoptimisation.png").stat().st_size > 20_000
    assert len((folder / "points.jsonl").read_text(encoding="utf-8").splitlines()) == 3 * 10 + 10 + 10
    assert len(json.loads((folder / "run.json").read_text(encoding="utf-8"))["data"]) == 5
    # What was interrupted is made anew from the same points.
    info = json.loads((folder / "run.json").read_text(encoding="utf-8")) | {"status": "interrupted"}
    (folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    assert rlhf("resume", str(folder)) == 0
    after = json.loads((folder / "overoptimisation.json").read_text(encoding="utf-8"))
    assert after["curves"][0]["gold"]["alpha"] == pytest.approx(found["curves"][0]["gold"]["alpha"])
    assert [one["verdict"] for one in after["curves"]] == [one["verdict"] for one in found["curves"]]
    capsys.readouterr()
    for curves, words in [
        ("[]", "curves names nothing to fit"),
        ("[{sources: [ppo_0, best]}]", "joins runs that train with pools"),
        (f"[{{sources: '{csv}'}}]", "say law: rl or best_of_n"),
        ("[{sources: ppo_0, law: best_of_n}]", "its runs are rl; leave law out"),
        ("[{sources: nobody}]", "there is no run 'nobody'; runs in"),
        ("[{sources: ppo_0, max_kl: 0.3}]", "got 1 points at different KLs above 0"),
    ]:
        assert rlhf("overoptimize", "run.name=b", *place, f"curves={curves}") == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_a_real_ppo_run_leaves_what_the_fit_needs(tmp_path: Path) -> None:
    def settings(name: str, *more: str) -> list[str]:
        return [f"run.output_dir={tmp_path}", f"run.name={name}", "run.device=cpu", "run.num_threads=1", *more]

    words = "rewards=[{name: length_penalty, arguments: {target_words: 4}}, "
    words += "{name: 'rlhf.data.tinychat:gold_reward', weight: 0}]"
    small = ["ppo.num_iterations=8", "ppo.rollout_batch_size=16", "generation.max_new_tokens=16", "ppo.target_kl=null"]
    fast = ["optimizer.learning_rate=0.003", "kl.coefficient=0", "data.max_samples=64", "hacking.every=1"]
    run_ppo(load_config(PPOConfig, overrides=settings("ppo", words, *small, *fast)))
    # The watch of the same run has the same gold, KL and reward.
    found = find_points("ppo", Columns(), None, tmp_path).tracks[0]
    config = (tmp_path / "ppo" / "config.yaml").read_text(encoding="utf-8")
    assert config.count("weight: 0.0") == 1
    (tmp_path / "ppo" / "config.yaml").write_text(config.replace("weight: 0.0", "weight: 1.0"), encoding="utf-8")
    watched = find_points("ppo", Columns(), None, tmp_path).tracks[0]
    for one, other in ((found.kl_M, watched.kl_M), (found.gold_M, watched.gold_M), (found.proxy_M, watched.proxy_M)):
        assert one.tolist() == pytest.approx(other.tolist(), abs=1e-5)
    assert found.kl_M[0] == pytest.approx(0, abs=1e-5) and found.kl_M[-1] > 0.05
    fit = fit_curve(Curve("ppo", "rl", "fitted", (found,)), num_resamples=300)
    assert math.isfinite(fit.gold.alpha.estimate) and fit.gold.alpha.low < fit.gold.alpha.high
    assert fit.proxy.r_squared > 0
