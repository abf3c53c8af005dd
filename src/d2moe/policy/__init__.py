"""What to read, what to evict, in which order: decisions over a ledger of what is resident, never over the clock."""

POLICIES = {
    "hebf": "d2moe.policy.policy:Policy",
    "preload": "d2moe.policy.preload:Preload",
    "resident-first": "d2moe.policy.resident_first:ResidentFirst",
    "on-demand": "d2moe.policy.on_demand:OnDemand",
    "copies": "d2moe.policy.on_demand:Copies",
    "lru": "d2moe.policy.lru:Lru",
    "lfu": "d2moe.policy.lfu:Lfu",
    "edgemoe": "d2moe.policy.edgemoe:EdgeMoE",
    "hobbit": "d2moe.policy.hobbit:Hobbit",
    "adapmoe": "d2moe.policy.adapmoe:AdapMoE",
    "emoe": "d2moe.policy.emoe:EMoE",
    "lookahead": "d2moe.policy.lookahead:Lookahead",
    "priority": "d2moe.policy.priority:Priority",
    "belady": "d2moe.policy.belady:Belady",
}
"""Module and class by name; see docs/policies.md."""
