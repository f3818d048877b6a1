"""What is good: recall as the paper defines it, the protocol around it, baselines and the closing report."""
