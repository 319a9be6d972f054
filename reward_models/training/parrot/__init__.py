"""A critic distilled from preferences, after PARROT of RationalRewards: a teacher that knows the label writes
rationales, those that predict the label without it are kept, and a student learns to write them from one picture."""

from reward_models.training.parrot.distil import Distillation, distil
from reward_models.training.parrot.rationales import Teacher, rationalise, teacher

__all__ = ["Distillation", "Teacher", "distil", "rationalise", "teacher"]
