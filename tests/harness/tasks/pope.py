"""POPE's own functions, for scenes_pope.yaml."""

from lmms_eval.tasks.pope.utils import *  # noqa: F403
