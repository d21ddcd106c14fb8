"""The scheduling rules of a configuration."""

from mlbox.config import Config, QuotaConfig
from mlbox.scheduler.policy import Quota, Rules, Weights
from mlbox.scheduler.queue import WaitingQuota
from mlbox.scheduler.watch import WatchRules

_HOUR_S = 3600.0


def rules_of(config: Config) -> Rules:
    """What `policy` and `backfill` need of the configuration."""
    scheduler = config.scheduler
    return Rules(
        weights=Weights(
            priority=scheduler.priority_weight,
            fair_share=scheduler.fair_share_weight,
            age=scheduler.age_weight,
            age_max_s=scheduler.age_max_h * _HOUR_S,
        ),
        half_life_s=scheduler.half_life_h * _HOUR_S,
        shares=scheduler.shares,
        reservations=scheduler.reservations,
        min_run_s=scheduler.min_run_s,
        grace_s=config.jobs.grace_s,
        cpu_slot_weight=scheduler.cpu_slot_weight,
        user_quota=_quota(scheduler.quota),
        user_quotas={name: _quota(quota) for name, quota in scheduler.users.items()},
        project_quotas={name: _quota(quota) for name, quota in scheduler.projects.items()},
    )


def watch_rules(config: Config) -> WatchRules:
    """What `watch` needs of the configuration."""
    scheduler = config.scheduler
    return WatchRules(
        over_share_s=scheduler.over_share_s,
        over_share_stops=scheduler.over_share == "stop",
        idle_notice_s=scheduler.idle_notice_s,
        idle_lower_s=scheduler.idle_lower_s,
        idle_stop_s=scheduler.idle_stop_s,
        suspects=scheduler.drain_suspects,
    )


def weight_of(config: Config, gpu_name: str) -> float:
    """What a second on this GPU is charged: of the words that are in its name, the longest decides."""
    words = [word for word in config.scheduler.gpu_weights if word.lower() in gpu_name.lower()]
    return config.scheduler.gpu_weights[max(words, key=len)] if words else 1.0


def waiting_quota(rules: Rules, user: str, project: str) -> WaitingQuota:
    """How many jobs of a user and of a project may wait."""
    of_project = rules.quota_of_project(project)
    return WaitingQuota(user=rules.quota_of_user(user).waiting, project=of_project.waiting if of_project else None)


def _quota(quota: QuotaConfig) -> Quota:
    return Quota(gpus=quota.gpus, waiting=quota.waiting, gpu_hours=quota.gpu_hours, window_s=quota.window_h * _HOUR_S)
