"""Recipes for adaptive_search.py, in the four rounds in which they were tried.

A recipe is a family and what it changes. Keys are the settings below, adaptive_search.Moments'
fields for linear weights, and with `embedding_` in front for embeddings and norm gains. Roles: q,
k, v, o, f (MLP in), p (MLP out); roles="f2 p0.25" are factors on lr.
"""

from experiments.search.recipe_bench import recipes_of

SETTINGS = dict(
    lr=4e-3,  # of linear weights
    embedding_lr=8e-3,  # of all the rest
    vector_lr=0.0,  # of norm gains; 0: embedding_lr
    wpe_lr=1.0,  # of position embeddings, relative to embedding_lr
    roles="",
    momentum_roles="qkvofp",  # the linear weights that keep a momentum
    qkv_apart=True,  # second moments of q, k and v apart
    per_head="",  # roles with second moments a head
)
SHARED = ("decay", "beta2", "power", "clip_at")  # fields that hold for all kinds of weights

ADAM = dict(momentum=0.9, of="gradient", decay=0.0, clip="none")
ADAM |= {f"embedding_{key}": value for key, value in ADAM.items()} | {"embedding_second": "element"}
FAMILIES = {
    "adafactor": {},
    "adafactor+": dict(embedding_lr=1.6e-2, embedding_momentum=0.9),
    "adamsn": dict(second="row", **ADAM),
    "adamw": dict(second="element", embedding_lr=4e-3, **ADAM),
}


def expand(family, overrides):
    """The whole recipe: SETTINGS, and dicts of Moments' fields for each kind of weights."""
    recipe = SETTINGS | dict(linear={}, embedding={}, vector={})
    for key, value in {**FAMILIES[family], **overrides}.items():
        if key in SETTINGS:
            recipe[key] = value
        elif key in SHARED:
            for kind in ("linear", "embedding", "vector"):
                recipe[kind] = recipe[kind] | {key: value}
        elif key.startswith("embedding_"):
            field = key.removeprefix("embedding_")
            recipe["embedding"] = recipe["embedding"] | {field: value}
            if field not in ("second", "bits", "soft", "now"):  # vectors: one each, 32 bits
                recipe["vector"] = recipe["vector"] | {field: value}
        else:
            recipe["linear"] = recipe["linear"] | {key: value}
    recipe["vector"] = recipe["vector"] | {"second": "element"}
    return recipe


def vary(family, common, *changes):
    """[(family, overrides)], one for each of `changes`, all with what is common."""
    return [(family, common | change) for change in changes]


FOUR = dict(roles="f2 p0.25")
HALF = dict(roles="f2 p0.5")
EIGHT = dict(roles="f2 p0.125")
OUT = dict(momentum=0.8, momentum_roles="o", bits=4)  # a momentum of attention's output alone
NESTEROV8 = dict(momentum=0.8, nu=0.8)
SHORT = HALF | dict(momentum=0.8)

ROUNDS = {
    "1": [
        *vary(
            "adafactor+",
            {},
            {},
            dict(lr=3e-3),
            dict(lr=6e-3),
            dict(embedding_lr=1.2e-2),
            dict(embedding_lr=2.4e-2),
            dict(qkv_apart=False),
            dict(clip="none"),
            dict(clip="row"),
            dict(clip="unit"),
            dict(clip="rowunit"),
            dict(clip="unit", lr=6e-3),
            dict(soft=1.0),
            dict(soft=2.0),
            dict(soft=3.0),
            dict(soft=2.0, lr=6e-3),
            dict(soft=1.0, lr=6e-3),
            dict(soft=0.3, lr=3e-3),
            dict(now="col"),
            dict(now="row"),
            dict(now="colrow"),
            dict(now="colrow", lr=6e-3),
            dict(now="colrow", soft=2.0),
            dict(embedding_momentum=0.8),
            dict(embedding_momentum=0.85),
            dict(embedding_momentum=0.95),
            dict(embedding_of="gradient"),
            dict(embedding_second="element"),
            dict(embedding_of="gradient", embedding_second="element"),
            dict(embedding_soft=2.0),
            dict(embedding_now="row"),
            dict(embedding_nu=0.9),
            dict(embedding_nu=0.95, embedding_momentum=0.95),
            OUT,
            OUT | dict(momentum_roles="v"),
            dict(momentum=0.8, bits=4),
            dict(momentum=0.8),
            dict(momentum=0.9, momentum_roles="o"),
            dict(roles="q0.5 k0.5"),
            dict(roles="q2 k2"),
            dict(roles="v0.5 o0.5"),
            dict(roles="v2 o2"),
            dict(roles="f0.5"),
            dict(roles="f2"),
            dict(roles="p0.5"),
            dict(roles="p2"),
            dict(center="row"),
            dict(center="col"),
            dict(vector_lr=8e-3),
            dict(vector_lr=4e-3),
            dict(wpe_lr=0.33),
            dict(beta2=0.95),
            dict(beta2=0.999),
            dict(power=0.8, lr=3e-3),
            dict(per_head="qk"),
        ),
        *vary(
            "adamsn",
            {},
            {},
            dict(momentum=0.8),
            dict(late="col", lr=8e-3),
            dict(late="colrow", lr=8e-3),
            dict(of="update"),
            dict(of="update", soft=2.0),
            dict(of="update", now="col"),
            dict(now="col"),
            dict(now="col", momentum=0.8),
        ),
        ("adamw", {}),
    ],
    "2": [
        *vary(
            "adafactor+",
            HALF,
            {},
            dict(embedding_lr=1.2e-2),
            dict(embedding_lr=8e-3),
            dict(lr=3e-3),
            dict(lr=6e-3),
            FOUR,
            dict(roles="f1.4 p0.7"),
            dict(roles="f4 p0.5"),
            dict(roles="f2"),
            dict(roles="p0.5"),
            dict(roles="f2 p0.5 q2 k2"),
            dict(roles="f2 p0.5 q1.4 k1.4 v0.7 o0.7"),
            OUT,
            OUT | dict(embedding_lr=1.2e-2),
            OUT | dict(embedding_bits=8),
            dict(roles="") | OUT,
            OUT | dict(momentum=0.9),
            OUT | dict(embedding_momentum=0.0, embedding_lr=8e-3),
            dict(momentum=0.8, bits=4),
            dict(momentum=0.8, bits=4, lr=6e-3),
            dict(clip="none"),
            dict(embedding_beta2=0.999),
            dict(embedding_beta2=0.95),
            OUT | dict(bits=2),
            dict(roles=""),
        ),
        *vary(
            "adafactor", {}, {}, HALF, HALF | dict(embedding_lr=1.2e-2), dict(embedding_lr=1.2e-2)
        ),
        *vary(
            "adamsn",
            HALF,
            dict(roles=""),
            {},
            SHORT,
            dict(lr=3e-3),
            dict(lr=6e-3),
            dict(roles="f2"),
            dict(roles="f2 p0.5 q2 k2"),
            dict(roles="f4 p0.5"),
            FOUR,
            dict(embedding_lr=1.2e-2),
        ),
        *vary("adamw", {}, {}, HALF, SHORT, dict(momentum=0.8)),
    ],
    "3": [
        ("adafactor+", {}),
        *vary(
            "adafactor",
            FOUR,
            {},
            dict(roles="p0.25"),
            EIGHT,
            dict(roles="f4 p0.25"),
            dict(roles="f1.4 p0.35"),
            dict(embedding_lr=1.2e-2),
            dict(lr=3e-3),
            dict(lr=6e-3),
            OUT,
            OUT | dict(bits=2),
            OUT | dict(momentum=0.9),
            OUT | dict(momentum_roles="ov"),
            dict(qkv_apart=False),
            dict(decay=0.8),
            dict(clip="none"),
            dict(roles="f2 p0.25 q2 k2"),
            OUT | dict(embedding_lr=1.2e-2),
            OUT | dict(embedding_momentum=0.9, embedding_bits=2),
        ),
        *vary(
            "adafactor+",
            FOUR | OUT,
            {},
            dict(roles="p0.25"),
            dict(embedding_bits=4),
            dict(embedding_bits=4, qkv_apart=False),
            dict(bits=2, embedding_bits=4),
            dict(bits=2, embedding_bits=8),
            dict(embedding_lr=1.2e-2, embedding_bits=4),
            dict(embedding_lr=1.2e-2, lr=3e-3, embedding_bits=4),
            dict(embedding_lr=1.2e-2, lr=6e-3, embedding_bits=4),
            dict(momentum_roles="qkvofp"),
            dict(momentum_roles="op"),
            dict(momentum_roles="ovf"),
        ),
        *vary(
            "adamsn",
            FOUR | dict(momentum=0.8),
            {},
            dict(roles="p0.25"),
            EIGHT,
            dict(roles="f4 p0.25"),
            dict(lr=3e-3),
            dict(lr=6e-3),
            dict(momentum=0.7),
            dict(embedding_lr=1.2e-2),
            dict(roles="f2 p0.25 q2 k2"),
            dict(nu=0.8),
        ),
        *vary("adamw", {}, {}, FOUR, FOUR | dict(momentum=0.8)),
    ],
    "4": [
        ("adafactor+", {}),
        *vary("adamw", {}, {}, dict(nu=0.9), NESTEROV8, FOUR | dict(nu=0.9), FOUR | NESTEROV8),
        *vary("adamsn", {}, NESTEROV8, dict(nu=0.9)),
        *vary(
            "adafactor",
            EIGHT | dict(embedding_lr=1.2e-2),
            {},
            dict(roles="f2 p0.125 o0.5"),
            dict(roles="f2 p0.125 v0.5 o0.5"),
            dict(roles="f2 p0.125 q0.5 k0.5"),
            dict(lr=3e-3),
            dict(roles="f2 p0.06"),
            dict(roles="f3 p0.125"),
            dict(roles="f2 p0.125 v0.5"),
            dict(clip_at=0.7),
            dict(clip_at=2.0),
            dict(beta2=0.999),
            dict(wpe_lr=2.0),
            dict(lr=3e-3, roles="f2 p0.125 q1.4 k1.4"),
            dict(roles="f2 p0.25 o0.5"),
            dict(roles="f1 p0.125 o0.5 v0.5", lr=6e-3),
        ),
        *vary(
            "adamsn",
            FOUR | NESTEROV8,
            {},
            dict(momentum=0.9, nu=0.9),
            dict(momentum=0.95, nu=0.95),
            dict(momentum=0.9, nu=0.7),
            dict(momentum=0.9),
            dict(momentum=0.95),
            dict(momentum=0.95, nu=0.6),
            dict(embedding_nu=0.9),
            dict(lr=3e-3),
            dict(lr=6e-3),
            EIGHT,
            dict(roles="f2 p0.25 o0.5"),
            dict(roles="f3 p0.25"),
            dict(embedding_lr=1.2e-2),
            dict(embedding_momentum=0.8),
            dict(embedding_second="run", embedding_bits=8, bits=8),
            dict(momentum=0.9, nu=0.9, lr=6e-3),
        ),
        *vary(
            "adafactor+",
            FOUR | OUT | dict(embedding_bits=4),
            {},
            dict(nu=0.8),
            dict(roles="f2 p0.25 o2"),
            dict(lr=3e-3),
        ),
    ],
}


def name_of(family, overrides):
    """'adamsn: lr=0.006 nu=0.8': the family, and what is not as its own, sorted."""
    default = SETTINGS | {"bits": 32, "momentum": 0.0, "nu": 1.0} | FAMILIES[family]
    words = [
        f"{key}={value}" for key, value in sorted(overrides.items()) if default.get(key) != value
    ]
    return f"{family}: {' '.join(words)}" if words else family


RECIPES = {
    number: {name_of(*recipe): expand(*recipe) for recipe in recipes}
    for number, recipes in ROUNDS.items()
}


def recipes_named(names):
    """'1,4' (rounds), 'all' or whole names by commas -> {name: recipe}. Raises UserError."""
    return recipes_of(names, RECIPES)
