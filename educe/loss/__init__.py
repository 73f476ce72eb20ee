"""Token-weighted losses from hidden states, without full logits."""
