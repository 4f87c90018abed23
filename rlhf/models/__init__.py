"""Models: the frozen backbone, the LoRA adapters on it, and the policy, reference, value and reward built from them."""
