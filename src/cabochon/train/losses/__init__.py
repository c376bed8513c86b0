"""Losses of the output head, value and gradients in one walk over chunks of tokens, never with the batch's logits.

    fused.py          the walk: `cross_entropy`, `likelihood` and `distill`, what a training loop calls
    logits.py         soft cap, temperature, log-normaliser and the softmax's gradient, for one chunk
    cross_entropy.py  targets that are one token each: label smoothing, z-loss
    likelihood.py     any function of the targets' log-probabilities
    divergences.py    forward and reverse KL, Jensen-Shannon, total variation
    live.py           a chunk against models that run beside the student
    teachers.py       where a teacher's distribution comes from: a live model, its top k, or draws from it

Every loss is a sum over tokens divided by a count that the caller gives, so that steps in parts weigh by token.
"""
