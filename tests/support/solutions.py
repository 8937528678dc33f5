"""Every exercise of the course, solved as a student would; and mistakes that students make, with their kind."""

from typing import NamedTuple

SOLVED = {
    "small-steps": """
def da(dscaled, b): return dscaled * b
def db(dscaled, a): return (dscaled * a).sum(1, keepdim=True)
def dx(dtotal, x): return torch.ones_like(x) * dtotal
def dz(dsquare, dshifted, z): return dsquare * 2 * z + dshifted
def ds(dpicked, s, index):
    d = torch.zeros_like(s)
    for i, at in enumerate(index):
        d[at] += dpicked[i]
    return d
def dA(dD, B): return dD @ B.T
def dB(dD, A): return A.T @ dD
def dc(dD): return dD.sum(0)
""",
    "mlp": """
def dlogprobs(logprobs, targets, n):
    d = torch.zeros_like(logprobs)
    d[range(n), targets] = -1.0 / n
    return d
def dprobs(dlogprobs, probs): return (1.0 / probs) * dlogprobs
def dcounts_sum_inv(dprobs, counts): return (counts * dprobs).sum(1, keepdim=True)
def dcounts_sum(dcounts_sum_inv, counts_sum): return -(counts_sum**-2) * dcounts_sum_inv
def dcounts(dprobs, dcounts_sum, counts_sum_inv, counts):
    d = counts_sum_inv * dprobs
    d += torch.ones_like(counts) * dcounts_sum
    return d
def dnorm_logits(dcounts, counts): return counts * dcounts
def dlogit_maxes(dnorm_logits): return (-dnorm_logits).sum(1, keepdim=True)
def dlogits(dnorm_logits, dlogit_maxes, logits):
    d = dnorm_logits.clone()
    d += F.one_hot(logits.max(1).indices, num_classes=27) * dlogit_maxes
    return d
def dh(dlogits, W2): return dlogits @ W2.T
def dW2(dlogits, h): return h.T @ dlogits
def db2(dlogits): return dlogits.sum(0)
def dhpreact(dh, h): return (1.0 - h**2) * dh
def dbngain(dhpreact, bnraw): return (bnraw * dhpreact).sum(0, keepdim=True)
def dbnbias(dhpreact): return dhpreact.sum(0, keepdim=True)
def dbnraw(dhpreact, bngain): return bngain * dhpreact
def dbnvar_inv(dbnraw, bndiff): return (bndiff * dbnraw).sum(0, keepdim=True)
def dbnvar(dbnvar_inv, bnvar): return (-0.5 * (bnvar + 1e-5) ** -1.5) * dbnvar_inv
def dbndiff2(dbnvar, bndiff2, n): return (1.0 / (n - 1)) * torch.ones_like(bndiff2) * dbnvar
def dbndiff(dbnraw, dbndiff2, bnvar_inv, bndiff): return bnvar_inv * dbnraw + 2 * bndiff * dbndiff2
def dbnmeani(dbndiff): return (-dbndiff).sum(0, keepdim=True)
def dhprebn(dbndiff, dbnmeani, hprebn, n): return dbndiff.clone() + 1.0 / n * (torch.ones_like(hprebn) * dbnmeani)
def dembcat(dhprebn, W1): return dhprebn @ W1.T
def dW1(dhprebn, embcat): return embcat.T @ dhprebn
def db1(dhprebn): return dhprebn.sum(0)
def demb(dembcat, emb): return dembcat.view(emb.shape)
def dC(demb, C, tokens):
    d = torch.zeros_like(C)
    for k in range(tokens.shape[0]):
        for j in range(tokens.shape[1]):
            d[tokens[k, j]] += demb[k, j]
    return d
""",
    "cross-entropy": """
def dlogits(logits, targets):
    n = logits.shape[0]
    d = F.softmax(logits, 1)
    d[range(n), targets] -= 1
    return d / n
""",
    "batch-norm": """
def dhprebn(dhpreact, hprebn, bngain, n):
    var_inv = (hprebn.var(0, keepdim=True) + 1e-5) ** -0.5
    raw = (hprebn - hprebn.mean(0, keepdim=True)) * var_inv
    return bngain * var_inv / n * (n * dhpreact - dhpreact.sum(0) - n / (n - 1) * raw * (dhpreact * raw).sum(0))
""",
    "training": """
def gradients(C, W1, b1, W2, b2, bngain, bnbias, tokens, targets):
    n = len(tokens)
    embcat = C[tokens].view(n, -1)
    hprebn = embcat @ W1 + b1
    var_inv = (hprebn.var(0, keepdim=True) + 1e-5) ** -0.5
    raw = (hprebn - hprebn.mean(0, keepdim=True)) * var_inv
    h = torch.tanh(bngain * raw + bnbias)
    dlogits = F.softmax(h @ W2 + b2, 1)
    dlogits[range(n), targets] -= 1
    dlogits /= n
    dpre = (1 - h**2) * (dlogits @ W2.T)
    dhprebn = bngain * var_inv / n * (n * dpre - dpre.sum(0) - n / (n - 1) * raw * (dpre * raw).sum(0))
    demb = (dhprebn @ W1.T).view(n, 3, 10)
    dC = torch.zeros_like(C).index_add(0, tokens.view(-1), demb.view(-1, 10))
    dgain, dbias = (raw * dpre).sum(0, keepdim=True), dpre.sum(0, keepdim=True)
    return dC, embcat.T @ dhprebn, dhprebn.sum(0), h.T @ dlogits, dlogits.sum(0), dgain, dbias
def train(parameters, batches, lr):
    for tokens, targets in batches:
        parameters = [p - lr * g for p, g in zip(parameters, gradients(*parameters, tokens, targets))]
    return parameters
""",
    "layer-norm": """
def hat(x):
    r = (x.var(-1, keepdim=True, correction=0) + 1e-5) ** -0.5
    return (x - x.mean(-1, keepdim=True)) * r, r
def dgamma(dy, x): return (dy * hat(x)[0]).sum((0, 1))
def dbeta(dy): return dy.sum((0, 1))
def dx(dy, x, gamma):
    normal, r = hat(x)
    g = dy * gamma
    return r * (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True))
""",
    "attention": """
def dv(dy, weights): return weights.transpose(1, 2) @ dy
def dweights(dy, v): return dy @ v.transpose(1, 2)
def dscores(dweights, weights): return weights * (dweights - (dweights * weights).sum(-1, keepdim=True))
def dq(dscores, k): return dscores @ k / math.sqrt(k.shape[-1])
def dk(dscores, q): return dscores.transpose(1, 2) @ q / math.sqrt(q.shape[-1])
""",
    "embedding": """
def dx(dlogits, W): return dlogits @ W
def dW(demb, dlogits, W, x, tokens):
    d = torch.zeros_like(W).index_add(0, tokens.flatten(), demb.flatten(0, 1))
    return d + dlogits.flatten(0, 1).T @ x.flatten(0, 1)
""",
    "rms-norm": """
def dgamma(dy, x): return (dy * x * (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5).sum((0, 1))
def dx(dy, x, gamma):
    r = (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5
    g = dy * gamma
    return r * (g - x * r * (g * x * r).mean(-1, keepdim=True))
""",
    "ranking": """
def dbetter(better, worse): return -(1 - torch.sigmoid(better - worse)) / 8
def dworse(better, worse): return (1 - torch.sigmoid(better - worse)) / 8
""",
    "rotary": """
def dx(dy, cos, sin):
    one, two = dy.chunk(2, -1)
    return dy * cos + torch.cat([two, -one], -1) * sin
""",
    "convolution": """
def dbias(dy): return dy.sum((0, 2))
def dkernel(dy, x, kernel):
    t = dy.shape[2]
    return torch.stack([(dy @ x[:, :, 2 * k : 2 * k + t].transpose(1, 2)).sum(0) for k in range(3)], 2)
def dx(dy, x, kernel):
    d, t = torch.zeros_like(x), dy.shape[2]
    for k in range(3):
        d[:, :, 2 * k : 2 * k + t] += kernel[:, :, k].T @ dy
    return d
""",
    "block": """
def back(x, g):
    r = (x.var(-1, keepdim=True, correction=0) + 1e-5) ** -0.5
    n = (x - x.mean(-1, keepdim=True)) * r
    return r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
def dact(dx2, W2): return dx2 @ W2.T
def dW2(dx2, act): return act.flatten(0, 1).T @ dx2.flatten(0, 1)
def dhidden(dact, hidden): return dact * (hidden > 0)
def db1(dhidden): return dhidden.sum((0, 1))
def dx1(dx2, dn2, x1): return dx2 + back(x1, dn2)
def dmixed(dx1, Wo): return dx1 @ Wo.T
def dscores(dweights, weights): return weights * (dweights - (dweights * weights).sum(-1, keepdim=True))
def dn1(dq, dk, dv, Wq, Wk, Wv): return dq @ Wq.T + dk @ Wk.T + dv @ Wv.T
def dWk(dk, n1): return n1.flatten(0, 1).T @ dk.flatten(0, 1)
def dx(dx1, dn1, x): return dx1 + back(x, dn1)
""",
}


class Mistake(NamedTuple):
    """A change of a solution that makes one of its answers wrong."""

    exercise: str
    blank: str
    old: str
    new: str
    kind: str


MISTAKES = [
    Mistake(*one)
    for one in (
        ("small-steps", "da", "dscaled * b", "dscaled", "factor"),
        ("small-steps", "db", ".sum(1, keepdim=True)", "", "missing sum"),
        ("small-steps", "db", ".sum(1, keepdim=True)", ".sum(1)", "shape"),
        ("small-steps", "db", ".sum(1, keepdim=True)", "[:, :1]", "missing sum"),
        ("small-steps", "dx", "torch.ones_like(x) * dtotal", "dtotal", "shape"),
        ("small-steps", "dz", "dsquare * 2 * z + dshifted", "dsquare * 2 * z", "overwritten"),
        ("small-steps", "dz", "dsquare * 2 * z + dshifted", "dshifted", "overwritten"),
        ("small-steps", "dz", "dsquare * 2 * z", "dsquare * z", "factor"),
        ("small-steps", "ds", "d[at] += dpicked[i]", "d[at] = dpicked[i]", "overwritten"),
        ("small-steps", "dA", "dD @ B.T", "(dD @ B.T).T", "transposed"),
        ("small-steps", "dc", "dD.sum(0)", "dD.mean(0)", "factor"),
        ("small-steps", "dc", "dD.sum(0)", "dD[0]", "missing sum"),
        ("mlp", "dlogprobs", "-1.0 / n", "-1.0", "factor"),
        ("mlp", "dlogprobs", "-1.0 / n", "1.0 / n", "factor"),
        ("mlp", "dprobs", "(1.0 / probs) * dlogprobs", "dlogprobs", "factor"),
        ("mlp", "dcounts_sum_inv", "(counts * dprobs).sum(1, keepdim=True)", "counts * dprobs", "missing sum"),
        ("mlp", "dcounts_sum_inv", "dprobs).sum(1, keepdim=True)", "dprobs).sum(1)", "shape"),
        ("mlp", "dcounts_sum", "-(counts_sum**-2)", "(counts_sum**-2)", "factor"),
        ("mlp", "dcounts_sum", "counts_sum**-2", "counts_sum**-1", "factor"),
        ("mlp", "dcounts", "d += torch.ones_like(counts) * dcounts_sum", "pass", "overwritten"),
        ("mlp", "dcounts", "d += torch", "d = torch", "overwritten"),
        ("mlp", "dnorm_logits", "counts * dcounts", "dcounts", "factor"),
        ("mlp", "dlogit_maxes", "(-dnorm_logits).sum(1, keepdim=True)", "torch.zeros(32, 1)", "missing"),
        ("mlp", "dlogit_maxes", "(-dnorm_logits).sum(1, keepdim=True)", "-dnorm_logits", "missing sum"),
        ("mlp", "dlogits", "d += F.one_hot", "0 * F.one_hot", "overwritten"),
        ("mlp", "dh", "dlogits @ W2.T", "(W2 @ dlogits.T)", "transposed"),
        ("mlp", "dW2", "h.T @ dlogits", "dlogits.T @ h", "transposed"),
        ("mlp", "db2", "dlogits.sum(0)", "dlogits.sum(0, keepdim=True)", "shape"),
        ("mlp", "db2", "dlogits.sum(0)", "dlogits", "missing sum"),
        ("mlp", "dhpreact", "(1.0 - h**2) * dh", "(1.0 - h) * dh", "factor"),
        ("mlp", "dhpreact", "(1.0 - h**2) * dh", "dh", "factor"),
        ("mlp", "dbngain", ".sum(0, keepdim=True)", ".sum(0)", "shape"),
        ("mlp", "dbngain", ".sum(0, keepdim=True)", "", "missing sum"),
        ("mlp", "dbnraw", "bngain * dhpreact", "dhpreact", "factor"),
        ("mlp", "dbnvar_inv", ".sum(0, keepdim=True)", ".mean(0, keepdim=True)", "factor"),
        ("mlp", "dbnvar", "-0.5 *", "0.5 *", "factor"),
        ("mlp", "dbnvar", "** -1.5", "** -0.5", "factor"),
        ("mlp", "dbndiff2", "1.0 / (n - 1)", "1.0 / n", "Bessel"),
        ("mlp", "dbndiff2", "torch.ones_like(bndiff2) * dbnvar", "dbnvar", "shape"),
        ("mlp", "dbndiff", "bnvar_inv * dbnraw + 2 * bndiff * dbndiff2", "bnvar_inv * dbnraw", "overwritten"),
        ("mlp", "dbndiff", "2 * bndiff * dbndiff2", "bndiff * dbndiff2", "factor"),
        ("mlp", "dbnmeani", "(-dbndiff).sum(0, keepdim=True)", "-dbndiff", "missing sum"),
        ("mlp", "dhprebn", "dbndiff.clone() + 1.0", "1.0", "overwritten"),
        ("mlp", "dhprebn", "1.0 / n *", "1.0 / (n - 1) *", "Bessel"),
        ("mlp", "dhprebn", "1.0 / n *", "1.0 *", "factor"),
        ("mlp", "dembcat", "dhprebn @ W1.T", "W1 @ dhprebn.T", "transposed"),
        ("mlp", "db1", "dhprebn.sum(0)", "torch.zeros(64)", "missing"),
        ("mlp", "demb", "dembcat.view(emb.shape)", "dembcat", "shape"),
        ("mlp", "dC", "d[tokens[k, j]] += demb[k, j]", "d[tokens[k, j]] = demb[k, j]", "overwritten"),
        ("cross-entropy", "dlogits", "d / n", "d", "factor"),
        ("cross-entropy", "dlogits", "d[range(n), targets] -= 1", "pass", "missing sum"),
        ("batch-norm", "dhprebn", "n / (n - 1) * raw", "raw", "Bessel"),
        ("batch-norm", "dhprebn", "- dhpreact.sum(0) ", "", "missing sum"),
        ("batch-norm", "dhprebn", "bngain * var_inv", "var_inv", "factor"),
        ("batch-norm", "dhprebn", "* (dhpreact * raw).sum(0)", "* dhpreact * raw", "missing sum"),
        ("batch-norm", "dhprebn", "- n / (n - 1)", "+ n / (n - 1)", "factor"),
        ("cross-entropy", "dlogits", "-= 1", "+= 1", "factor"),
        ("layer-norm", "dx", "(g * normal).mean(-1, keepdim=True)", "(g * normal).sum(-1, keepdim=True)", "factor"),
        ("attention", "dweights", "dy @ v.transpose(1, 2)", "v @ dy.transpose(1, 2)", "transposed"),
        ("block", "dn1", "dq @ Wq.T", "dq @ Wq", "transposed"),
        ("mlp", "dbngain", "bnraw * dhpreact", "dhpreact", "factor"),
        ("training", "gradients", "dlogits /= n", "pass", "factor"),
        ("training", "train", "p - lr * g", "p + lr * g", "other"),
        ("layer-norm", "dgamma", ".sum((0, 1))", ".sum(0)", "missing sum"),
        ("layer-norm", "dbeta", "dy.sum((0, 1))", "dy.sum((0, 1), keepdim=True)", "shape"),
        ("layer-norm", "dx", "- g.mean(-1, keepdim=True)", "", "missing sum"),
        ("layer-norm", "dx", "g = dy * gamma", "g = dy", "factor"),
        ("attention", "dv", "weights.transpose(1, 2) @ dy", "weights @ dy", "transposed"),
        ("attention", "dscores", " - (dweights * weights).sum(-1, keepdim=True)", "", "missing sum"),
        ("attention", "dq", "dscores @ k / math.sqrt(k.shape[-1])", "dscores @ k", "factor"),
        ("attention", "dk", "dscores.transpose(1, 2) @ q", "dscores @ q", "transposed"),
        ("embedding", "dW", "return d + ", "return ", "overwritten"),
        ("embedding", "dW", "index_add", "index_copy", "overwritten"),
        ("rms-norm", "dx", " - x * r * (g * x * r).mean(-1, keepdim=True)", "", "missing sum"),
        ("rms-norm", "dgamma", ".sum((0, 1))", "", "missing sum"),
        ("ranking", "dbetter", "-(1", "(1", "factor"),
        ("ranking", "dworse", " / 8", "", "factor"),
        ("rotary", "dx", "[two, -one]", "[-two, one]", "factor"),
        ("convolution", "dx", "+= kernel", "= kernel", "overwritten"),
        ("convolution", "dbias", "dy.sum((0, 2))", "dy.sum(0)", "missing sum"),
        ("convolution", "dkernel", ".sum(0) for", "[0] for", "missing sum"),
        ("block", "dhidden", "dact * (hidden > 0)", "dact", "factor"),
        ("block", "dx1", "dx2 + back(x1, dn2)", "back(x1, dn2)", "overwritten"),
        ("block", "dn1", " + dv @ Wv.T", "", "overwritten"),
        ("block", "dWk", "dk.flatten(0, 1)", "dk.flatten(0, 1) * 2", "factor"),
        ("block", "dmixed", "dx1 @ Wo.T", "dx1 @ Wo", "transposed"),
        ("block", "db1", ".sum((0, 1))", ".mean((0, 1))", "factor"),
        ("small-steps", "dA", "dD @ B.T", "B.T @ dD", "transposed"),
        ("small-steps", "dB", "A.T @ dD", "dD @ A.T", "transposed"),
        ("small-steps", "dz", "dsquare * 2 * z", "dsquare * 2", "factor"),
        ("mlp", "dbndiff", "2 * bndiff * dbndiff2", "2 * dbndiff2", "factor"),
        ("batch-norm", "dhprebn", "(dhpreact * raw).sum(0)", "dhpreact.sum(0)", "factor"),
        ("batch-norm", "dhprebn", "keepdim=True)) * var_inv", "keepdim=True))", "factor"),
        ("layer-norm", "dgamma", "dy * hat(x)[0]", "dy", "factor"),
        ("layer-norm", "dx", "normal).mean(-1, keepdim=True)", "normal).mean(-2, keepdim=True)", "missing sum"),
        ("rms-norm", "dx", "(g * x * r)", "(x * r)", "factor"),
        ("rms-norm", "dx", "(g * x * r)", "(g * x)", "factor"),
        ("training", "gradients", "embcat.T @ dhprebn", "2 * embcat.T @ dhprebn", "factor"),
        ("training", "gradients", "(raw * dpre).sum(0, keepdim=True)", "(dpre).sum(0, keepdim=True)", "factor"),
    )
]  # fmt: skip
