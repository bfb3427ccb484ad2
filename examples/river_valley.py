"""Draws the river valley of arXiv 2410.05192: a high rate runs along the river, a decay comes down to it."""

import sys
from pathlib import Path

import altair as alt
import numpy as np

from lookfar.config import TrainingConfig
from lookfar.study.rate_curves import save
from lookfar.training.schedules import rate

SLOPE, NOISE, BUDGETS = 0.02, 0.5, [150, 300, 600]  # of the river; of a gradient across it; in updates
WAYS = {"low": ("constant", 0.08), "high": ("constant", 0.8), "wsd_s": (f"wsd_s(budgets={BUDGETS})", 0.8)}
OPACITY = alt.Opacity("height:Q", scale=alt.Scale(range=[0.05, 0.45]), legend=None)
WALKS = 500  # the loss, y² / 2 - SLOPE · x, is their mean; the first is drawn

bands = [{"y": y / 10, "top": y / 10 + 0.1, "height": (y + 0.5) ** 2 / 200} for y in range(-14, 14)]
valley = alt.Chart(alt.Data(values=bands)).mark_rect(color="#2f6b36").encode(OPACITY)
valley, panels, losses = valley.encode(alt.Y("y:Q", title="across"), y2="top:Q"), [], []
for (name, (schedule, peak)), colour in zip(WAYS.items(), ("#316ddc", "#ce7029", "#922075"), strict=True):
    config = TrainingConfig(updates=BUDGETS[-1], schedule=schedule, warmup=0, floor=0.05)
    random, x, y, walk = np.random.default_rng(0), 0.0, np.full(WALKS, 0.5), []
    for update in range(config.updates):
        step = peak * rate(update, config)
        x, y = x + step * SLOPE, y - step * (y + NOISE * random.standard_normal(WALKS))
        height = (y**2).mean() / 2
        walk.append({"update": update + 1, "x": x, "y": y[0], "loss": height - SLOPE * x})
        if update + 1 in BUDGETS:
            place = f"{x:.2f} along the river, {height:.4f} above it"
            print(f"{name} after {update + 1} updates: {place}, loss {walk[-1]['loss']:.4f}")
    chart = alt.Chart(alt.Data(values=walk)).mark_line(clip=True, color=colour, strokeWidth=1.2)
    along = alt.X("x:Q", title="along the river", scale=alt.Scale(domain=[0, SLOPE * 0.8 * BUDGETS[-1]]))
    plane = chart.encode(along, alt.Y("y:Q", scale=alt.Scale(domain=[-1.4, 1.4])))
    panels.append((valley + plane).properties(width=560, height=110, title=f"{schedule}, peak {peak}"))
    losses.append(chart.encode(alt.X("update:Q"), alt.Y("loss:Q", scale=alt.Scale(domain=[-0.2, 0.12]))))
figure = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/example") / "river_valley.svg"
save(alt.vconcat(*panels, alt.layer(*losses).properties(width=560, height=200)), figure)
print(f"The figure is {figure}")
