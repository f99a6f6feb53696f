"""The equations of neighbourhood attention, once more: loops over rows, heads and edges, float64.

Nothing is shared with the library, not even its structure: edges come as the caller's list, and the
gradients are written by hand from the quotient a = e / (Z + eps), not from the LSE.
"""

import numpy as np


def neighborhood_attention(edge_index, q, k, v, bias, do, dlse, *, scale, low, high, eps):
    """-> o, lse, weights, dq, dk, dv, dbias; ``edge_index`` is [2, E], source above target."""
    rows, heads, _ = q.shape
    group = heads // k.shape[1]
    edges = list(zip(*edge_index, strict=True))
    o = np.zeros((rows, heads, v.shape[2]))
    lse = np.full((rows, heads), -np.inf)
    weights = np.zeros((len(edges), heads))
    dq, dk, dv, dbias = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape), weights.copy()
    for i in range(rows):
        mine = [(e, j) for e, (j, target) in enumerate(edges) if target == i]
        for h in range(heads):
            logit, inside = {}, {}
            for e, j in mine:
                raw = scale * (q[i, h] @ k[j, h // group])
                inside[e] = low <= raw <= high
                logit[e] = min(max(raw, low), high) + (0.0 if bias is None else bias[e, h])
            top = max(logit.values(), default=-np.inf)
            if top == -np.inf:
                continue
            power = {e: np.exp(s - top) for e, s in logit.items()}
            total = sum(power.values())
            lse[i, h] = top + np.log(total)
            with np.errstate(over="ignore"):
                divisor = total + (eps * np.exp(-top) if eps else 0.0)
            for e, j in mine:
                weights[e, h] = power[e] / divisor
                o[i, h] += weights[e, h] * v[j, h // group]
            da = {e: do[i, h] @ v[j, h // group] for e, j in mine}
            mean = sum(weights[e, h] * da[e] for e, _ in mine)
            for e, j in mine:
                ds = weights[e, h] * (da[e] - mean) + dlse[i, h] * power[e] / total
                dbias[e, h] = ds
                dv[j, h // group] += weights[e, h] * do[i, h]
                if inside[e]:
                    dq[i, h] += scale * ds * k[j, h // group]
                    dk[j, h // group] += scale * ds * q[i, h]
    return o, lse, weights, dq, dk, dv, dbias
