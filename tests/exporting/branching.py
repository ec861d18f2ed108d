"""Networks whose path depends on their input, in the spellings that Python offers.

`ZOO` holds small networks of the known families, `SPELLINGS` one module for each way of writing control flow; all are
deterministic and take one or two inputs.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

Out = collections.namedtuple("Out", "a b")


def conv(i: int, o: int, stride: int = 1) -> Any:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Res(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.a, self.b = (conv(c, c), nn.Sequential(nn.Conv2d(c, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c)))

    def forward(self, x: Any) -> Any:
        return F.relu(x + self.b(self.a(x)))


class SDN(nn.Module):
    N = 6

    def __init__(self, n: Any = None) -> None:
        super().__init__()
        self.N = n or self.N
        self.stem = conv(3, 8)
        self.blocks = nn.ModuleList(Res(8) for _ in range(self.N))
        self.ics = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)) for _ in range(self.N)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Any, thr: Any) -> Any:
        x = self.stem(x)
        for i, (blk, ic) in enumerate(zip(self.blocks, self.ics, strict=False)):
            x = blk(x)
            out = ic(x)
            conf = F.softmax(out, dim=1).max()
            if conf > thr[i]:
                return out
        return self.head(x)


class SDNOrig(SDN):
    def forward(self, x: Any, thr: Any) -> Any:
        outputs, confidences, output_id = ([], [], 0)
        x = self.stem(x)
        for blk, ic in zip(self.blocks, self.ics, strict=False):
            x = blk(x)
            output = ic(x)
            outputs.append(output)
            confidence = torch.max(F.softmax(output[0], dim=0))
            confidences.append(confidence)
            if confidence >= thr[output_id]:
                is_early = True
                return (output, output_id, is_early)
            output_id += 1  # noqa: SIM113
        output = self.head(x)
        outputs.append(output)
        confidences.append(torch.max(F.softmax(output[0], dim=0)))
        best = torch.stack(confidences).argmax()
        return torch.stack(outputs)[best], best, False


class FFGate(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c, self.fc = (conv(c, 4, 2), nn.Linear(4, 1))

    def forward(self, x: Any) -> Any:
        return torch.sigmoid(self.fc(self.c(x).mean((2, 3))))[0, 0]


class SkipFF(nn.Module):
    def __init__(self, n: Any = (3, 2, 2)) -> None:
        super().__init__()
        self.n, w = (n, (8, 12, 16))
        self.stem, self.total = (conv(3, 8), sum(n))
        for g in range(3):
            for i in range(n[g]):
                setattr(self, f"group{g + 1}_ds{i}", conv(w[g - 1], w[g], 2) if i == 0 and g else None)
                setattr(self, f"group{g + 1}_layer{i}", Res(w[g]))
                setattr(self, f"group{g + 1}_gate{i}", FFGate(w[g]))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Any, thr: Any) -> Any:
        x = self.stem(x)
        k = 0
        for g in range(3):
            for i in range(self.n[g]):
                if getattr(self, f"group{g + 1}_ds{i}") is not None:
                    x = getattr(self, f"group{g + 1}_ds{i}")(x)
                prev = x
                gate = getattr(self, f"group{g + 1}_gate{i}")(x)
                if gate > thr[k]:
                    x = getattr(self, f"group{g + 1}_layer{i}")(x)
                x = 0.9 * x + 0.1 * prev
                k += 1
        return self.fc(x.mean((2, 3)))


class SkipRNN(nn.Module):
    def __init__(self, n: Any = 6) -> None:
        super().__init__()
        self.stem, self.layers = (conv(3, 8), nn.ModuleList(Res(8) for _ in range(n)))
        self.cell, self.proj, self.fc = (nn.LSTMCell(8, 10), nn.Linear(10, 1), nn.Linear(8, 10))

    def forward(self, x: Any, thr: Any) -> Any:
        x = self.stem(x)
        h = c = x.new_zeros(x.shape[0], 10)
        for i, layer in enumerate(self.layers):
            h, c = self.cell(x.mean((2, 3)), (h, c))
            gate = torch.sigmoid(self.proj(h))
            if gate[0, 0] > thr[i]:
                x = layer(x)
        return self.fc(x.mean((2, 3)))


class RNNGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.proj, self.hidden = (nn.LSTM(8, 10), nn.Linear(10, 1), None)

    def init_hidden(self, b: Any) -> Any:
        return (torch.zeros(1, b, 10), torch.zeros(1, b, 10))

    def forward(self, x: Any) -> Any:
        out, self.hidden = self.rnn(x.mean((2, 3)).view(1, x.size(0), -1), self.hidden)
        return torch.sigmoid(self.proj(out.squeeze(0)))


class SkipRNNAttr(nn.Module):
    def __init__(self, n: Any = 6) -> None:
        super().__init__()
        self.stem, self.layers = (conv(3, 8), nn.ModuleList(Res(8) for _ in range(n)))
        self.control, self.fc = (RNNGate(), nn.Linear(8, 10))

    def forward(self, x: Any, thr: Any) -> Any:
        self.control.hidden = self.control.init_hidden(x.size(0))
        x = self.stem(x)
        for i, layer in enumerate(self.layers):
            gate = self.control(x)
            if gate[0, 0] > thr[i]:
                x = layer(x)
        return self.fc(x.mean((2, 3)))


class Attn(nn.Module):
    def __init__(self, d: Any, h: Any) -> None:
        super().__init__()
        self.f, self.h, self.v = (nn.Linear(d, 16), nn.Linear(h, 16), nn.Linear(16, 1))

    def forward(self, feats: Any, h: Any) -> Any:
        a = self.v(torch.tanh(self.f(feats) + self.h(h).unsqueeze(1))).softmax(1)
        return (a * feats).sum(1)


class Captioner(nn.Module):
    V, END, D, H = (30, 2, 12, 16)

    def __init__(self, T: Any = 8) -> None:
        super().__init__()
        self.T = T
        self.enc = nn.Sequential(conv(3, 8, 2), conv(8, self.D, 2))
        self.attn, self.emb = (Attn(self.D, self.H), nn.Embedding(self.V, 8))
        self.cell, self.fc = (nn.LSTMCell(8 + self.D, self.H), nn.Linear(self.H, self.V))

    def forward(self, x: Any, bias: Any) -> Any:
        feats = self.enc(x).flatten(2).transpose(1, 2)
        h = feats.new_zeros(x.shape[0], self.H)
        c = feats.new_zeros(x.shape[0], self.H)
        tok = torch.ones(x.shape[0], dtype=torch.long)
        outs = []
        for t in range(self.T):
            ctx = self.attn(feats, h)
            h, c = self.cell(torch.cat([self.emb(tok), ctx], 1), (h, c))
            tok = (self.fc(h) + bias[t]).argmax(1)
            outs.append(tok)
            if tok == self.END:
                break
        return torch.stack(outs, 1)


class BlockDrop(nn.Module):
    def __init__(self, n: Any = (3, 2, 2)) -> None:
        super().__init__()
        w = (8, 12, 16)
        self.n, self.seed = (n, conv(3, 8))
        self.policy = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, sum(n)))
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(conv(w[g], w[g]), nn.Conv2d(w[g], w[g], 3, 1, 1)) for _ in range(n[g]))
            for g in range(3)
        )
        self.ds = nn.ModuleList(nn.Conv2d(w[max(g - 1, 0)], w[g], 1, 2 if g else 1) for g in range(3))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Any, ctl: Any) -> Any:
        policy = torch.sigmoid(self.policy(x) + ctl)[0]
        x = self.seed(x)
        t = 0
        for segment, num_blocks in enumerate(self.n):
            for b in range(num_blocks):
                residual = self.ds[segment](x) if b == 0 else x
                if policy[t] > 0.5:
                    fx = self.blocks[segment][b](residual)
                    x = F.relu(residual + fx)
                else:
                    x = residual
                t += 1
        return self.fc(x.mean((2, 3)))


class WhileGrow(nn.Module):
    END = 2

    def __init__(self, T: Any = 6) -> None:
        super().__init__()
        self.T, self.emb, self.q, self.fc = (T, nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))

    def forward(self, toks: Any, bias: Any) -> Any:
        while toks[0, -1] != self.END and toks.shape[1] < self.T:
            e = self.emb(toks)
            a = (self.q(e[:, -1:]) @ e.transpose(1, 2)).softmax(-1) @ e
            nxt = (self.fc(a[:, 0]) + bias[toks.shape[1] - 1]).argmax(-1, keepdim=True)
            toks = torch.cat([toks, nxt], 1)
        return toks


class WhileFixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8)
        with torch.no_grad():
            self.w.weight.mul_(0.5)

    def forward(self, x: Any, tol: Any) -> Any:
        prev = x + 1
        while (x - prev).abs().max() > tol:
            prev = x
            x = torch.tanh(self.w(x))
        return x


class WhileCount(WhileFixed):
    def forward(self, x: Any, tol: Any) -> Any:
        prev, n = (x + 1, 0)
        while (x - prev).abs().max() > tol:
            prev = x
            x = torch.tanh(self.w(x))
            n += 1
        return (x, n)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.l3 = (nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.ls = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        self.count = 0
        self.register_buffer("buf", torch.zeros(4))


class NestedIf(Base):
    def forward(self, x: Any) -> Any:
        y = z = x
        if x[0, 0] > 0:
            if x[0, 1] > 0:
                y = self.l1(x)
            elif x[0, 2] > 0:
                y, z = (self.l2(x), x + 1)
            else:
                z = self.l3(z)
        else:
            y = y * 2
        return (y + z, z)


class BoolOps(Base):
    def forward(self, x: Any) -> Any:
        if x[0, 0] > 0 and (x[0, 1] > 0 or not x[0, 2] > 0):
            return self.l1(x)
        return x


class TernaryLoop(Base):
    def forward(self, x: Any) -> Any:
        for layer in self.ls:
            x = layer(x) if x.sum() > 0 else x - 0.5
        return x


class ChainedCmp(Base):
    def forward(self, x: Any) -> Any:
        return self.l1(x) if -0.3 < x.mean() < 0.3 else self.l2(x)


class ItemFloat(Base):
    def forward(self, x: Any) -> Any:
        v = x.sum().item()
        if v > 0.5:
            x = x * v
        return x + float(1)


class FloatCall(Base):
    def forward(self, x: Any) -> Any:
        v = float(x.sum())
        if v > 0.5:
            x = x * v
        return x


class ItemIntCmp(Base):
    def forward(self, x: Any) -> Any:
        k = x.argmax().item()
        if k == 2:
            return self.l1(x)
        if k < 1:
            return self.l2(x)
        return x


class MoeIndex(Base):
    def forward(self, x: Any) -> Any:
        k = int(x.argmax())
        return self.ls[k](x)


class MoeLoop(Base):
    def forward(self, x: Any) -> Any:
        k = x.argmax()
        for i, layer in enumerate(self.ls):
            if k == i:
                x = layer(x)
        return x


class Cont(Base):
    def forward(self, x: Any) -> Any:
        acc = torch.zeros_like(x)
        for layer in self.ls:
            y = layer(x)
            if y.sum() < 0:
                continue
            acc = acc + y
            x = x + 0.1
        return acc


class InplaceBranch(Base):
    def forward(self, x: Any) -> Any:
        y = x.clone()
        if x.sum() > 0:
            y[:, 0] = 5
        else:
            y.add_(1)
        y *= 2
        return y


class InplaceBufferLoop(Base):
    def forward(self, x: Any) -> Any:
        buf = torch.zeros(1, 6)
        for t in range(6):
            v = self.ls[t](x).sum()
            buf[:, t] = v
            if v > 1:
                break
            x = x + v
        return buf


class ListBranch(Base):
    def forward(self, x: Any) -> Any:
        outs = [x]
        for layer in self.ls[:4]:
            if x.sum() > 0:
                x = layer(x)
                outs.append(x)
            else:
                x = x + 0.3
        return torch.stack(outs).sum(0)


class DictState(Base):
    def forward(self, x: Any) -> Any:
        st = {"h": x, "c": x * 0}
        for layer in self.ls:
            if st["h"].sum() > 0:
                st["h"] = layer(st["h"])
                st["c"] = st["c"] + 1
            else:
                st["h"] = st["h"] + 1
        return (st["h"], st["c"])


class AttrCounter(Base):
    def forward(self, x: Any) -> Any:
        self.count = 0
        for layer in self.ls:
            if x.sum() > 0:
                x = layer(x)
                self.count += 1
        return x * self.count


class CounterIndex(Base):
    def forward(self, x: Any) -> Any:
        n = 0
        for _i in range(4):
            if x.sum() > 0:
                x = self.ls[n](x)
                n += 1
            else:
                x = x + 0.4
        return x


class DtypeDiff(Base):
    def forward(self, x: Any) -> Any:
        y = x > 0 if x.sum() > 0 else x * 1.5
        return y + 1


class RankDiff(Base):
    def forward(self, x: Any) -> Any:
        y = x.mean() if x.sum() > 0 else self.l1(x)
        return y * 2 + x


class ShapeDiffMid(Base):
    def forward(self, x: Any) -> Any:
        y = x[:, :2] if x.sum() > 0 else torch.cat([x, x], 1)
        return ((y * 2).sum(1), y)


class Asserts(Base):
    def forward(self, x: Any) -> Any:
        assert (x < 100).all(), "too big"
        if x.max() > 100:
            raise ValueError("no")
        return self.l1(x)


class HelperReturn(Base):
    def pick(self, x: Any, layer: Any) -> Any:
        for k in range(3):
            y = layer(x)
            if y[0, k] > 0:
                return y
            x = x + 0.5
        return x

    def forward(self, x: Any) -> Any:
        for layer in self.ls:
            x = self.pick(x, layer)
        return x


def free_fn(x: Any, layer: Any) -> Any:
    if x.sum() > 0:
        return layer(x)
    return x + 1


class FreeHelper(Base):
    def forward(self, x: Any) -> Any:
        for layer in self.ls:
            x = free_fn(x, layer)
        return x


class Comprehension(Base):
    def forward(self, x: Any) -> Any:
        ys = [layer(x) if layer(x).sum() > 0 else x for layer in self.ls]
        return torch.stack(ys).mean(0)


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        if x.mean() > 0:
            return self.l(x)
        return x * 1.1 + 0.05


class SharedSub(Base):
    def __init__(self) -> None:
        super().__init__()
        self.g = Gate()

    def forward(self, x: Any) -> Any:
        for _ in range(5):
            x = self.g(x)
        return x


class WhileIfContinue(Base):
    def forward(self, x: Any) -> Any:
        n = 0
        while x.abs().max() > 0.2:
            n += 1
            if n > 3:
                x = x * 0.5
                continue
            x = x * 0.9 + 0.001
        return (x, n)


class WhileNested(Base):
    def forward(self, x: Any) -> Any:
        n = torch.zeros(())
        while x.abs().max() > 0.1:
            x = x * 0.7
            y = x * 2
            while y.abs().max() > 0.15:
                y = y * 0.5
                n = n + 1
            x = x + y * 0.01
        return (x, n)


class WhileReturnInside(Base):
    def forward(self, x: Any) -> Any:
        while x.abs().max() > 0.1:
            x = x * 0.8
            if x.sum() > 0.2:
                return x + 10
        return x


class WhileList(Base):
    def forward(self, x: Any) -> Any:
        outs = []
        while x.abs().max() > 0.05:
            x = x * 0.8
            outs.append(x)
        return torch.stack(outs) if outs else x[None]


class ForTensorIter(Base):
    def forward(self, x: Any) -> Any:
        acc = x.new_zeros(())
        for v in x[0]:
            if v < 0:
                break
            acc = acc + v
        return acc


class WithTry(Base):
    def forward(self, x: Any) -> Any:
        with torch.no_grad():
            if x.sum() > 0:
                x = self.l1(x)
        try:
            y = self.l2(x) if x.mean() > 0 else x
        finally:
            z = x
        return y + z


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        for layer in self.ls:
            if x.sum() > 0:
                x = layer(x)
        return x


class SBase(Base):
    def forward(self, x: Any) -> Any:
        if x[0, 0] > 0:
            x = self.l1(x)
        return x


class SuperCall(SBase):
    def forward(self, x: Any) -> Any:
        y = super().forward(x)
        if y.sum() > 0:
            y = y + 1
        return super().forward(y)


def _scaled_by(scale: float) -> Any:
    class Closure(Base):
        def forward(self, x: Any) -> Any:
            if x.sum() > 0:
                x = x * scale
            return x

    return Closure


class OutStruct(Base):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return {"y": self.l1(x), "k": Out(x, 1)}
        return {"y": x, "k": Out(x + 1, 2)}


class BuiltinMax(Base):
    def forward(self, x: Any) -> Any:
        return max(x[0, 0], x[0, 1]) + min(x[0, 2], 0.0)


class InTuple(Base):
    def forward(self, x: Any) -> Any:
        k = x.argmax()
        return self.l1(x) if k in (1, 2) else x


class Recursion(Base):
    def go(self, x: Any, d: Any) -> Any:
        if d == 3 or x.sum() > 1:
            return x
        return self.go(self.ls[d](x), d + 1) + x

    def forward(self, x: Any) -> Any:
        return self.go(x, 0)


class Generator(Base):
    def steps(self, x: Any) -> Any:
        for layer in self.ls:
            x = layer(x)
            yield x

    def forward(self, x: Any) -> Any:
        for y in self.steps(x):
            if y.sum() > 0:
                break
        return y


class NumpyTrip(Base):
    def forward(self, x: Any) -> Any:
        k = np.argmax(x.numpy())
        return x * float(k)


class Cache:
    def __init__(self) -> None:
        self.k, self.n = ([], 0)

    def update(self, i: Any, v: Any) -> Any:
        if i < len(self.k):
            self.k[i] = v
        else:
            self.k.append(v)
        self.n += 1
        return self.k[i]


class CacheObj(Base):
    def forward(self, x: Any) -> Any:
        c = Cache()
        for _t in range(3):
            for i in range(2):
                v = c.update(i, self.ls[i](x))
                if v.sum() > 0:
                    x = x + v
                    c.update(i, v * 2)
        return (x, c.k[0], c.k[1])


class BatchAll(Base):
    def forward(self, x: Any) -> Any:
        for layer in self.ls:
            x = layer(x)
            if (x.amax(1) > 0.1).all():
                return x
        return x - 1


class DelVar(Base):
    def forward(self, x: Any) -> Any:
        t = x * 2
        if x.sum() > 0:
            x = x + t
            del t
        else:
            t = t + 1
            x = t
        return x


class SameCond(Base):
    def forward(self, x: Any) -> Any:
        c = x.sum() > 0
        if c:
            a = self.l1(x)
        x = x + 1
        if c:
            x = x + a
        return x


class FlagPy(Base):
    def forward(self, x: Any) -> Any:
        found = False
        for layer in self.ls:
            if not found:
                y = layer(x)
                if y.sum() > 0:
                    found = True
                    x = y
        if found:
            x = x * 2
        return (x, found)


class Walrus(Base):
    def forward(self, x: Any) -> Any:
        if (m := x.max()) > 0.5:
            x = x * m
        return x + m


class MatchStmt(Base):
    def forward(self, x: Any) -> Any:
        match bool(x.sum() > 0):
            case True:
                x = self.l1(x)
            case _:
                x = x - 1
        return x


class Prints(Base):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            print(end="")
            x = x + 1
        return x


class Alias(Base):
    def forward(self, x: Any) -> Any:
        prev = x
        for layer in self.ls:
            if x.sum() > 0:
                x = layer(x)
            x = x + 0.1 * prev
            prev = x
        return (x, prev)


class NonzeroLen(Base):
    def forward(self, x: Any) -> Any:
        idx = (x[0] > 0).nonzero()
        if len(idx) == 0:
            return x.sum()
        return x[0, idx[:, 0]].sum()


class RangeTensor(Base):
    def forward(self, x: Any) -> Any:
        n = (x > 0).sum()
        for _ in range(int(n)):
            x = self.l1(x)
        return x


class StatefulBuffer(Base):
    def forward(self, x: Any) -> Any:
        self.buf.zero_()
        for layer in self.ls:
            if x.sum() > 0:
                self.buf += x[0]
                x = layer(x)
        return x + self.buf


class LambdaBody(Base):
    def forward(self, x: Any) -> Any:
        def f(v):
            return self.l1(v) if v.sum() > 0 else v

        for _ in range(4):
            x = f(x) + 0.1
        return x


class ExitInElse(Base):
    def forward(self, x: Any) -> Any:
        for i, layer in enumerate(self.ls):
            if x.sum() > -1:
                x = layer(x)
                if x[0, 0] > 0.3:
                    x = x * 2
            else:
                return (x, torch.tensor(i))
        else:
            x = x + 100
        return (x, torch.tensor(-1))


class WhileTrueBreak(Base):
    def forward(self, x: Any) -> Any:
        while True:
            x = torch.tanh(self.l1(x)) * 0.4
            if x.abs().max() < 0.3:
                break
        return x


class LoopReturn(Base):
    def forward(self, x: Any) -> Any:
        for step in range(4):
            x = self.l1(x) + step
            if x.sum() > 1:
                return x, step
        return x, -1


class SwappedState(Base):
    """Both begin as one tensor, and change places in each turn."""

    def forward(self, x: Any) -> Any:
        a = b = x
        while (a + b).abs().max() > 0.2:
            a, b = b * 0.5, self.l1(a) * 0.3
        return a, b


class SometimesSet(Base):
    """A variable of the body that only some turns set."""

    def forward(self, x: Any) -> Any:
        last = x * 0
        while x.abs().max() > 0.2:
            if x.sum() > 0:
                last = x
            x = x * -0.7
        return x, last


class LoopInPlace(Base):
    def forward(self, x: Any) -> Any:
        seen = torch.zeros(4)
        while x.abs().max() > 0.2:
            seen += x[0]
            x = x * 0.6
        return x, seen


class TwoLists(Base):
    def forward(self, x: Any) -> Any:
        ones, twos = [x], []
        for step in range(6):
            x = torch.tanh(self.l1(x)) + 0.1 * step
            ones.append(x)
            twos.extend([x.sum(), x.mean()])
            if x.sum() > 0.9:
                break
        return torch.cat(ones, 1), torch.stack(twos)


class LoopDict(Base):
    def forward(self, x: Any) -> Any:
        state = {"h": x, "turns": 0}
        while state["h"].abs().max() > 0.3:
            state["h"] = self.l1(state["h"]) * 0.7
            state["turns"] += 1
        return state["h"], state["turns"]


class ListThatIsRead(Base):
    """Cannot be one Loop: what was appended is read in the next turn."""

    def forward(self, x: Any) -> Any:
        outs = [x]
        for _ in range(4):
            outs.append(self.l1(outs[-1]))
            if outs[-1].sum() > 0:
                break
        return outs[-1], torch.stack(outs).sum()


class Mangled(Base):
    def __step(self, x: Any) -> Any:
        return self.l1(x)

    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            return self.__step(x)
        return x


class WalrusInComprehension(Base):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            parts = [last := x * k for k in range(3)]
            x = parts[1] + last
        return x


class NegativeIndex(Base):
    def forward(self, x: Any) -> Any:
        return self.ls[int(x.argmax()) - 2](x)


class TryExcept(Base):
    def forward(self, x: Any) -> Any:
        try:
            if x.sum() > 0:
                raise KeyError("positive")
            y = x
        except KeyError:
            y = x * 2
        return y


class BreakBeforeAppend(Base):
    def forward(self, x: Any) -> Any:
        outs = [x]
        for t in range(5):
            x = torch.tanh(self.l1(x)) + 0.1 * t
            if x.sum() > 0.5:
                break
            outs.append(x)
        return torch.stack(outs).sum(0), x


class AfterTheLoop(Base):
    def forward(self, x: Any) -> Any:
        for t in range(5):
            y = self.l1(x) * (t + 1)
            x = x + 0.1 * y
            if y.sum() > 0.5:
                break
        return y, t


class CounterPicksModule(Base):
    def forward(self, x: Any) -> Any:
        for t in range(4):
            x = self.ls[t](x)
            if x.sum() > 0.4:
                break
        return x


class NestedFor(Base):
    def forward(self, x: Any) -> Any:
        n = 0
        for i in range(3):
            for j in range(3):
                x = torch.tanh(self.l1(x)) + 0.05 * (i * 3 + j)
                n += 1
                if x.sum() > 0.8:
                    break
            if x.sum() > 1.2:
                break
        return x, n


class WhileElse(Base):
    def forward(self, x: Any) -> Any:
        n = 0
        while n < 4 and x.sum() > -1:
            x = x - 0.4
            n += 1
        else:
            x = x * 2
        return x


class ListReadInWhile(Base):
    def forward(self, x: Any) -> Any:
        outs = [x]
        while outs[-1].abs().max() > 0.05:
            outs.append(outs[-1] * 0.8)
        return outs[-1]


def image() -> Any:
    return torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def _bits(count: int) -> list[Any]:
    return [torch.tensor(bits, dtype=torch.float) for bits in itertools.product([0, 1], repeat=count)]


def _exits(count: int) -> list[Any]:
    """Thresholds by which each exit is taken in turn, and last none."""
    return [torch.tensor([2.0] * k + [-1.0] * (count - k)) for k in range(count + 1)]


def _end_at(steps: int, words: int, end: int) -> list[Any]:
    """Biases by which the word that ends comes at each step in turn, and last never."""
    biases = []
    for step in range(steps + 1):
        bias = torch.zeros(steps, words)
        bias[:, end] = -1e4
        if step < steps:
            bias[step, end] = 1e4
        biases.append(bias)
    return biases


def _tolerances() -> list[Any]:
    return [torch.tensor(10.0**-power) for power in range(-2, 6)]


def _start() -> Any:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


# Name → the module, its first input, what its second input is on each path, and how many If and Loop it has.
ZOO: dict[str, tuple[Callable[[], Any], Any, list[Any], int, int]] = {
    "exits": (SDN, image(), _exits(6), 6, 0),
    "exits_with_lists": (SDNOrig, image(), _exits(6), 6, 0),
    "skip": (SkipFF, image(), [3 * bits - 1 for bits in _bits(7)], 7, 0),
    "skip_recurrent": (SkipRNN, image(), [3 * bits - 1 for bits in _bits(6)], 6, 0),
    "skip_recurrent_attribute": (SkipRNNAttr, image(), [3 * bits - 1 for bits in _bits(6)], 6, 0),
    "captioner": (Captioner, image(), _end_at(8, 30, 2), 0, 1),
    "block_drop": (BlockDrop, image(), [(bits * 2 - 1) * 100 for bits in _bits(7)], 7, 0),
    "grows": (WhileGrow, torch.tensor([[1]]), _end_at(6, 20, 2), 1, 1),
    "until_fixed": (WhileFixed, _start(), _tolerances(), 0, 1),
    "counted": (WhileCount, _start(), _tolerances(), 0, 1),
}

SPELLINGS: dict[str, Callable[[], Any]] = {
    kind.__name__: kind
    for kind in (
        NestedIf,
        BoolOps,
        TernaryLoop,
        ChainedCmp,
        ItemFloat,
        FloatCall,
        ItemIntCmp,
        MoeIndex,
        MoeLoop,
        Cont,
        InplaceBranch,
        InplaceBufferLoop,
        ListBranch,
        AttrCounter,
        CounterIndex,
        RankDiff,
        ShapeDiffMid,
        Asserts,
        HelperReturn,
        FreeHelper,
        Comprehension,
        SharedSub,
        WhileIfContinue,
        WhileNested,
        WhileReturnInside,
        WhileList,
        ForTensorIter,
        WithTry,
        Decorated,
        SBase,
        SuperCall,
        OutStruct,
        InTuple,
        Recursion,
        Generator,
        CacheObj,
        BatchAll,
        DelVar,
        SameCond,
        FlagPy,
        Walrus,
        MatchStmt,
        Prints,
        Alias,
        StatefulBuffer,
        LambdaBody,
        ExitInElse,
        DictState,
        WhileTrueBreak,
        LoopReturn,
        SwappedState,
        SometimesSet,
        LoopInPlace,
        TwoLists,
        ListThatIsRead,
        Mangled,
        WalrusInComprehension,
        LoopDict,
        _scaled_by(3.0),
        NegativeIndex,
        TryExcept,
        BreakBeforeAppend,
        AfterTheLoop,
        CounterPicksModule,
        NestedFor,
        WhileElse,
        NonzeroLen,
        RangeTensor,
    )
}
REFUSED: dict[str, Callable[[], Any]] = {kind.__name__: kind for kind in (DtypeDiff, NumpyTrip, ListReadInWhile)}
