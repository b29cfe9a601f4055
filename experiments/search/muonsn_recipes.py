"""Recipes for muonsn_search.py: what each changes of MuonSN's defaults, and why it might help."""

import ast

from experiments.search.recipe_bench import recipes_of

BASE = dict(lr=6e-3)  # between the two best rates of the first grid

FLAGSHIP = {  # about half of Adam's state: one momentum, and what costs next to nothing
    "base": {},
    "lr4": dict(lr=4e-3),
    "lr8": dict(lr=8e-3),
    "lr12": dict(lr=1.2e-2),
    "emb4": dict(embedding_lr=4e-3),
    "emb12": dict(embedding_lr=1.2e-2),
    "emb20": dict(embedding_lr=2e-2),
    "gains x3": dict(vector_lr=2.4e-2),
    "gains /4": dict(vector_lr=2e-3),
    "wpe x1/3": dict(wpe_lr=0.33),
    "wpe x3": dict(wpe_lr=3.0),
    # momentum
    "mu 0.9": dict(mu=0.9),
    "mu 0.8": dict(mu=0.8),
    "mu 0.98": dict(mu=0.98),
    "mu 0.95 to 0.8": dict(mu_end=0.8),
    "mu 0.8 to 0.95": dict(mu=0.8, mu_end=0.95),
    "mu warmup 300": dict(mu_warmup=300),
    "no nesterov": dict(nesterov=False),
    "mars 0.025": dict(mars=0.025),
    "mars 0.05": dict(mars=0.05),
    # orthogonalisation
    "polar": dict(ns="polar"),
    "steps 3": dict(steps=3),
    "steps 8": dict(steps=8),
    "qk per head": dict(per_head="qk"),
    "qkv per head": dict(per_head="qkv"),
    "qkvo per head": dict(per_head="qkvo"),
    # second moments
    "no second moment": dict(post=""),
    "post column": dict(post="column"),
    "post both": dict(post="both"),
    "post element": dict(post="element"),
    "post beta 0.99": dict(post_beta=0.99),
    "post beta 0.8": dict(post_beta=0.8),
    "pre row": dict(pre="row"),
    "pre column": dict(pre="column"),
    "pre both": dict(pre="both"),
    # rates of the roles
    "spectral scale": dict(scale="spectral"),
    "qk x2": dict(roles="q2 k2"),
    "qk x0.5": dict(roles="q0.5 k0.5"),
    "vo x2": dict(roles="v2 o2"),
    "vo x0.5": dict(roles="v0.5 o0.5"),
    "f x2": dict(roles="f2"),
    "f x0.5": dict(roles="f0.5"),
    "p x2": dict(roles="p2"),
    "p x0.5": dict(roles="p0.5"),
    # decay and masks
    "wd 0.03": dict(weight_decay=0.03),
    "wd 0.3": dict(weight_decay=0.3),
    "wd 1": dict(weight_decay=1.0),
    "cautious decay 0.3": dict(cautious_decay=True, weight_decay=0.3),
    "embedding wd 0": dict(embedding_decay=0.0),
    "embedding wd 0.5": dict(embedding_decay=0.5),
    "cautious": dict(cautious=True),
    # embeddings
    "embedding rows": dict(embedding="row"),
    "embedding muon": dict(embedding="muon"),
    "embedding beta1 0.8": dict(embedding_beta1=0.8),
    "embedding beta1 0.95": dict(embedding_beta1=0.95),
    "embedding beta2 0.95": dict(embedding_beta2=0.95),
    "embedding beta2 0.999": dict(embedding_beta2=0.999),
}

SMALL = {  # about 7% of Adam's state and less: few bits
    "8 bits": dict(bits=8, embedding="row"),
    "4 bits": dict(bits=4, embedding="row"),
    "4 bits mu 0.9": dict(bits=4, mu=0.9, embedding="row"),
    "4 bits mu 0.8": dict(bits=4, mu=0.8, embedding="row"),
    "4 bits mu 0.9 polar": dict(bits=4, mu=0.9, ns="polar", embedding="row"),
    "4 bits mu 0.9 pre both": dict(bits=4, mu=0.9, pre="both", embedding="row"),
    "4 bits mu 0.9 lr8": dict(bits=4, mu=0.9, lr=8e-3, embedding="row"),
    "2 bits mu 0.8": dict(bits=2, mu=0.8, embedding="row"),
    "1 bit mu 0.8": dict(bits=1, mu=0.8, embedding="row"),
    "1 bit mu 0.6": dict(bits=1, mu=0.6, embedding="row"),
}

NONE = {  # about 1%: no momentum in full
    "0": dict(mu=0.0, embedding="row", embedding_beta1=0.0),
    "0 embedding momentum": dict(mu=0.0, embedding="row"),
    "0 lr4": dict(mu=0.0, lr=4e-3, embedding="row"),
    "0 lr12": dict(mu=0.0, lr=1.2e-2, embedding="row"),
    "0 steps 1": dict(mu=0.0, steps=1, embedding="row"),
    "0 steps 2": dict(mu=0.0, steps=2, embedding="row"),
    "0 steps 3": dict(mu=0.0, steps=3, embedding="row"),
    "0 cubic 2": dict(mu=0.0, ns="cubic", steps=2, embedding="row"),
    "0 cubic 4": dict(mu=0.0, ns="cubic", steps=4, embedding="row"),
    "0 pre both": dict(mu=0.0, pre="both", embedding="row"),
    "0 pre column": dict(mu=0.0, pre="column", embedding="row"),
    "0 pre both steps 2": dict(mu=0.0, pre="both", steps=2, embedding="row"),
    "0 post both": dict(mu=0.0, post="both", embedding="row"),
    "0 post beta 0.99": dict(mu=0.0, post_beta=0.99, embedding="row"),
    "0 qk per head": dict(mu=0.0, per_head="qk", embedding="row"),
    "0 wd 0.3": dict(mu=0.0, weight_decay=0.3, embedding="row"),
    "0 emb12": dict(mu=0.0, embedding_lr=1.2e-2, embedding="row"),
    "rank 1": dict(mu=0.9, rank=1, embedding="row"),
    "rank 2": dict(mu=0.9, rank=2, embedding="row"),
    "rank 4": dict(mu=0.9, rank=4, embedding="row"),
    "rank 2 mu 0.8": dict(mu=0.8, rank=2, embedding="row"),
    "rank 2 mu 0.95": dict(mu=0.95, rank=2, embedding="row"),
    "rank 2 no nesterov": dict(mu=0.9, rank=2, nesterov=False, embedding="row"),
    "rank 2 lr4": dict(mu=0.9, rank=2, lr=4e-3, embedding="row"),
    "0 embedding beta1 0.95": dict(mu=0.0, embedding_beta1=0.95, embedding="row"),
    "rank 16": dict(mu=0.9, rank=16, embedding="row"),
    "momentum in o alone": dict(mu=0.9, momentum_roles="o", embedding="row"),
    "momentum in v alone": dict(mu=0.9, momentum_roles="v", embedding="row"),
    "momentum in qk alone": dict(mu=0.9, momentum_roles="qk", embedding="row"),
    "momentum in f alone": dict(mu=0.9, momentum_roles="f", embedding="row"),
    "momentum in p alone": dict(mu=0.9, momentum_roles="p", embedding="row"),
}

SECOND = dict(mu=0.9, embedding_beta1=0.8, embedding_lr=1.2e-2)  # what helped in FLAGSHIP

AFTER = {  # a second round from there
    "2": {},
    "2 emb8": dict(embedding_lr=8e-3),
    "2 emb16": dict(embedding_lr=1.6e-2),
    "2 lr4": dict(lr=4e-3),
    "2 lr8": dict(lr=8e-3),
    "2 mu 0.85": dict(mu=0.85),
    "2 mu 0.95 look 0.8": dict(mu=0.95, look=0.8),
    "2 look 0.8": dict(look=0.8),
    "2 look 0.95": dict(look=0.95),
    "2 mu to 0.8": dict(mu_end=0.8),
    "2 embedding beta1 0.7": dict(embedding_beta1=0.7),
    "2 embedding beta1 0.5": dict(embedding_beta1=0.5),
    "2 qk per head": dict(per_head="qk"),
    "2 pre column": dict(pre="column"),
    "2 post column": dict(post="column"),
    "2 mars 0.025": dict(mars=0.025),
    "2 mars 0.05": dict(mars=0.05),
    "2 mars 0.05 8 bits": dict(mars=0.05, bits=8, previous_bits=8),
    "2 steps 7": dict(steps=7),
    "2 wpe x3": dict(wpe_lr=3.0),
    "2 gains /4": dict(vector_lr=3e-3),
    "2 p x0.5": dict(roles="p0.5"),
    "2 qk x2": dict(roles="q2 k2"),
    "2 embedding beta2 0.95": dict(embedding_beta2=0.95),
    "2 qk per head pre column": dict(per_head="qk", pre="column"),
    "2 qk per head pre column mars": dict(per_head="qk", pre="column", mars=0.025),
    "2 8 bits": dict(bits=8, embedding="row"),
    "2 4 bits": dict(bits=4, embedding="row"),
    "2 4 bits nearest": dict(bits=4, rounding="nearest", embedding="row"),
    "2 4 bits lr8": dict(bits=4, lr=8e-3, embedding="row"),
    "2 4 bits nearest lr8": dict(bits=4, rounding="nearest", lr=8e-3, embedding="row"),
    "2 4 bits mu 0.8": dict(bits=4, mu=0.8, embedding="row"),
    "2 4 bits nearest mu 0.8": dict(bits=4, mu=0.8, rounding="nearest", embedding="row"),
    "2 4 bits nearest mu 0.8 look 0.7": dict(
        bits=4, mu=0.8, look=0.7, rounding="nearest", embedding="row"
    ),
    "2 4 bits nearest qk per head pre column": dict(
        bits=4, rounding="nearest", embedding="row", per_head="qk", pre="column"
    ),
    "2 3 bits nearest mu 0.8": dict(bits=3, mu=0.8, rounding="nearest", embedding="row"),
    "2 2 bits nearest mu 0.8": dict(bits=2, mu=0.8, rounding="nearest", embedding="row"),
}
AFTER = {name: SECOND | overrides for name, overrides in AFTER.items()}

THIRD = dict(mu=0.9, embedding_beta1=0.5, embedding_lr=1.2e-2)
FOUR = dict(bits=4, rounding="nearest", embedding="row")

FINAL = {  # a third, from the best of the second
    "3": {},
    "3 now": dict(pre="now"),
    "3 pre column": dict(pre="column"),
    "3 qk per head": dict(per_head="qk"),
    "3 qk per head now": dict(per_head="qk", pre="now"),
    "3 qk per head pre column": dict(per_head="qk", pre="column"),
    "3 qk per head pre column look": dict(per_head="qk", pre="column", mu=0.95, look=0.8),
    "3 now look": dict(pre="now", mu=0.95, look=0.8),
    "3 embedding beta1 0.3": dict(embedding_beta1=0.3),
    "3 qk per head pre column mars": dict(per_head="qk", pre="column", mars=0.025),
    "3 emb16": dict(embedding_lr=1.6e-2),
    "3 now lr4": dict(pre="now", lr=4e-3),
    "3 now lr8": dict(pre="now", lr=8e-3),
    "3 4 bits": dict(FOUR),
    "3 4 bits mu 0.8": dict(FOUR, mu=0.8),
    "3 4 bits now": dict(FOUR, pre="now"),
    "3 4 bits pre column": dict(FOUR, pre="column"),
    "3 4 bits mu 0.85 qk per head now": dict(FOUR, pre="now", per_head="qk", mu=0.85),
    "3 4 bits mu 0.85 qk per head pre column": dict(FOUR, pre="column", per_head="qk", mu=0.85),
    "3 0 now": dict(mu=0.0, embedding="row", embedding_beta1=0.0, lr=1.2e-2, pre="now"),
    "3 0 pre column": dict(mu=0.0, embedding="row", embedding_beta1=0.0, lr=1.2e-2, pre="column"),
}
FINAL = {name: THIRD | overrides for name, overrides in FINAL.items()}

ZERO = dict(mu=0.0, embedding="row", lr=1.2e-2, embedding_lr=1.2e-2)

NONE2 = {
    "00": dict(embedding_beta1=0.0),
    "00 embedding momentum": {},
    "00 embedding momentum 0.8": dict(embedding_beta1=0.8),
    "00 embedding momentum 0.5": dict(embedding_beta1=0.5),
    "00 em lr16": dict(lr=1.6e-2),
    "00 em emb20": dict(embedding_lr=2e-2),
    "00 em pre column": dict(pre="column"),
    "00 em pre both": dict(pre="both"),
    "00 em steps 3": dict(steps=3),
    "00 em cubic 4": dict(ns="cubic", steps=4),
    "00 em cubic 8": dict(ns="cubic", steps=8),
    "00 em qk per head": dict(per_head="qk"),
    "00 em rank 1": dict(mu=0.9, rank=1),
    "00 em rank 2": dict(mu=0.9, rank=2),
    "00 em rank 2 mu 0.8": dict(mu=0.8, rank=2),
    "00 em rank 4": dict(mu=0.9, rank=4),
    "00 em rank 4 lr8": dict(mu=0.9, rank=4, lr=8e-3),
    "00 em rank 8": dict(mu=0.9, rank=8),
    "00 em element": dict(embedding="element"),
}
NONE2 = {name: ZERO | overrides for name, overrides in NONE2.items()}

FAMILIES = {
    "flagship": FLAGSHIP,
    "small": SMALL,
    "none": NONE,
    "after": AFTER,
    "final": FINAL,
    "none2": NONE2,
}


def recipes_named(names):
    """'flagship,rank 1,mu=0.9+ns=polar' or 'all' -> {name: overrides}; a recipe can be spelt out.

    Raises UserError for an unknown name.
    """
    return {
        name: BASE | overrides for name, overrides in recipes_of(names, FAMILIES, _spelt).items()
    }


def _spelt(name):
    """'mu=0.9+ns=polar' -> {'mu': 0.9, 'ns': 'polar'}"""
    return {key: _value(value) for key, value in (item.split("=", 1) for item in name.split("+"))}


def _value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a word
