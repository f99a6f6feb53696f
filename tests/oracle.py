"""The equations of neighbourhood attention, once more: loops over rows, heads and edges, float64.

Nothing is shared with the library, not even its structure: edges come as the caller's list, and the
gradients are written by hand from the quotient a = e / (Z + eps), not from the LSE.
"""

import numpy as np


def neighborhood_attention(
    edge_index,
    q,
    k,
    v,
    bias,
    do,
    dlse,
    *,
    scale,
    low,
    high,
    eps,
    edge_gate=None,
    edge_key=None,
    edge_value=None,
    edge_attr=None,
    edge_key_weight=None,
    edge_value_weight=None,
    dscores=None,
    dropout=0.0,
    seed=0,
    numbers=None,
    first_head=0,
):
    """-> {name: array} of o, lse, weights, scores and the gradient of every input.

    ``edge_index`` is [2, E], source above target; absent inputs are None, and their gradients 0.
    """
    rows, heads, width = q.shape
    group = heads // k.shape[1]
    edges = list(zip(*edge_index, strict=True))
    o = np.zeros((rows, heads, v.shape[2]))
    lse = np.full((rows, heads), -np.inf)
    weights = np.zeros((len(edges), heads))
    scores = np.zeros((len(edges), heads, width))
    inputs = {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "edge_gate": edge_gate,
        "edge_key": edge_key,
        "edge_value": edge_value,
        "edge_attr": edge_attr,
        "edge_key_weight": edge_key_weight,
        "edge_value_weight": edge_value_weight,
    }
    grads = {f"d{name}": np.zeros(np.shape(x)) for name, x in inputs.items() if x is not None}

    def add(name, at, what):
        if inputs[name] is not None:
            grads[f"d{name}"][at] += what

    def key_and_value(e, j, h):
        key, value = k[j, h // group].copy(), v[j, h // group].copy()
        if edge_key is not None:
            key += edge_key[e, h]
        if edge_value is not None:
            value += edge_value[e, h]
        if edge_key_weight is not None:
            key += edge_attr[e] @ edge_key_weight[:, h]
        if edge_value_weight is not None:
            value += edge_attr[e] @ edge_value_weight[:, h]
        return key, value

    for i in range(rows):
        mine = [(e, j) for e, (j, target) in enumerate(edges) if target == i]
        for h in range(heads):
            logit, inside, kept, gate, key, value = {}, {}, {}, {}, {}, {}
            for e, j in mine:
                key[e], value[e] = key_and_value(e, j, h)
                gate[e] = np.ones(width)
                if edge_gate is not None:
                    gate[e] = gate[e] * edge_gate[e, h]
                scores[e, h] = scale * q[i, h] * key[e] * gate[e]
                raw = scores[e, h].sum()
                inside[e] = low <= raw <= high
                logit[e] = min(max(raw, low), high) + (0.0 if bias is None else bias[e, h])
                number = e if numbers is None else numbers[e]
                kept[e] = dropout_share(seed, number, first_head + h, dropout)
            top = max(logit.values(), default=-np.inf)
            ds = dict.fromkeys(logit, 0.0)
            if top > -np.inf:
                power = {e: np.exp(s - top) for e, s in logit.items()}
                total = sum(power.values())
                lse[i, h] = top + np.log(total)
                with np.errstate(over="ignore"):
                    divisor = total + (eps * np.exp(-top) if eps else 0.0)
                for e, _ in mine:
                    weights[e, h] = power[e] / divisor
                    o[i, h] += kept[e] * weights[e, h] * value[e]
                da = {e: kept[e] * (do[i, h] @ value[e]) for e, _ in mine}
                mean = sum(weights[e, h] * da[e] for e, _ in mine)
                for e, _ in mine:
                    ds[e] = weights[e, h] * (da[e] - mean) + dlse[i, h] * power[e] / total
            for e, j in mine:
                add("bias", (e, h), ds[e])
                dt = np.full(width, ds[e] if inside[e] else 0.0)
                if dscores is not None:
                    dt += dscores[e, h]
                dkey = scale * q[i, h] * gate[e] * dt
                dvalue = kept[e] * weights[e, h] * do[i, h]
                add("q", (i, h), scale * key[e] * gate[e] * dt)
                add("k", (j, h // group), dkey)
                add("v", (j, h // group), dvalue)
                dgate = scale * q[i, h] * key[e] * dt
                by_channel = edge_gate is not None and edge_gate.ndim == 3
                add("edge_gate", (e, h), dgate if by_channel else dgate.sum())
                add("edge_key", (e, h), dkey)
                add("edge_value", (e, h), dvalue)
                for name, flow in (("edge_key_weight", dkey), ("edge_value_weight", dvalue)):
                    if inputs[name] is not None:
                        add("edge_attr", e, inputs[name][:, h] @ flow)
                        add(name, (slice(None), h), np.outer(edge_attr[e], flow))
    return {"o": o, "lse": lse, "weights": weights, "scores": scores} | grads


def dropout_share(seed, edge, head, p):
    """0 for a dropped weight, else 1 / (1 - p): Philox-4x32-10, whole numbers all the way."""
    if p == 0:
        return 1.0
    word, limit = 2**32, round(p * 2**24)
    c = [edge % word, edge // word, head // 4, 0]
    a, b = seed % word, seed // word % word
    for _ in range(10):
        x, y = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [y // word ^ c[1] ^ a, y % word, x // word ^ c[3] ^ b, x % word]
        a, b = (a + 0x9E3779B9) % word, (b + 0xBB67AE85) % word
    return 2**24 / (2**24 - limit) if c[head % 4] // 256 >= limit else 0.0


def additive_attention(
    edge_index,
    q,
    k,
    v,
    weight,
    do,
    dlse,
    *,
    slope,
    edge_key=None,
    edge_attr=None,
    edge_key_weight=None,
    edge_bias=None,
    dropout=0.0,
    seed=0,
    numbers=None,
    first_head=0,
):
    """-> {name: array} of o, lse, weights and the gradient of every input that there is."""
    (rows, heads, width), edges = q.shape, list(zip(*edge_index, strict=True))
    o, lse = np.zeros((rows, heads, v.shape[2])), np.full((rows, heads), -np.inf)
    weights = np.zeros((len(edges), heads))
    inputs = {"q": q, "k": k, "v": v, "weight": weight, "edge_key": edge_key}
    inputs |= {"edge_attr": edge_attr, "edge_key_weight": edge_key_weight, "edge_bias": edge_bias}
    grads = {f"d{name}": np.zeros(np.shape(x)) for name, x in inputs.items() if x is not None}

    def add(name, at, what):
        if inputs[name] is not None:
            grads[f"d{name}"][at] += what

    for i in range(rows):
        mine = [(e, j) for e, (j, target) in enumerate(edges) if target == i]
        for h in range(heads):
            t, logit, kept = {}, {}, {}
            for e, j in mine:
                t[e] = [q[i, h, c] + k[j, h, c] for c in range(width)]
                for c in range(width):
                    if edge_key is not None:
                        t[e][c] += edge_key[e, h, c]
                    if edge_key_weight is not None:
                        t[e][c] += edge_attr[e] @ edge_key_weight[:, h, c]
                logit[e] = 0.0 if edge_bias is None else edge_bias[e, h]
                logit[e] += sum(
                    weight[h, c] * (x if x > 0 else slope * x) for c, x in enumerate(t[e])
                )
                number = e if numbers is None else numbers[e]
                kept[e] = dropout_share(seed, number, first_head + h, dropout)
            top = max(logit.values(), default=-np.inf)
            if top == -np.inf:
                continue
            power = {e: np.exp(s - top) for e, s in logit.items()}
            total = sum(power.values())
            lse[i, h] = top + np.log(total)
            da = {e: kept[e] * (do[i, h] @ v[j, h]) for e, j in mine}
            mean = sum(power[e] / total * da[e] for e, _ in mine)
            for e, j in mine:
                share = weights[e, h] = power[e] / total
                o[i, h] += kept[e] * share * v[j, h]
                add("v", (j, h), kept[e] * share * do[i, h])
                ds = share * (da[e] - mean) + dlse[i, h] * share
                add("edge_bias", (e, h), ds)
                for c, x in enumerate(t[e]):
                    dt = ds * weight[h, c] * (1.0 if x > 0 else slope)
                    add("weight", (h, c), ds * (x if x > 0 else slope * x))
                    add("q", (i, h, c), dt)
                    add("k", (j, h, c), dt)
                    add("edge_key", (e, h, c), dt)
                    if edge_key_weight is not None:
                        add("edge_attr", e, edge_key_weight[:, h, c] * dt)
                        add("edge_key_weight", (slice(None), h, c), edge_attr[e] * dt)
    return {"o": o, "lse": lse, "weights": weights} | grads
