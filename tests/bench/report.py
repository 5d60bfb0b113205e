"""What was measured: figures, the table, JSON lines, and what got worse than a baseline."""

import dataclasses
import json
import statistics

from targets import Target

COLUMNS = ["work", "case", "figure", "unit", "median", "min .. max", "target", "", "note"]
# Differences below these are rounding, whatever their percentage.
GRAIN = {"ms": 0.1, "us": 0.5, "s": 0.01, "MB": 1, "x": 0.05}
WORSE = 1.10  # times the baseline's median: less is not worth a word


@dataclasses.dataclass(frozen=True)
class Figure:
    """One thing measured, once a round.

    `better` is "low" or "high", `target` one of `targets`, whose bound is on the median, or None.
    """

    workload: str
    case: str
    figure: str
    unit: str
    values: list
    better: str = "low"
    target: Target = None
    note: str = ""

    @property
    def key(self):
        return (self.workload, self.case, self.figure, self.unit)

    @property
    def median(self):
        return statistics.median(self.values)

    @property
    def verdict(self):
        """"ok", "over" or "under" the target; "" without one."""
        if self.target is None:
            return ""
        if self.better == "low":
            return "ok" if self.median <= self.target.bound else "over"
        return "ok" if self.median >= self.target.bound else "under"

    @property
    def goal(self):
        """The target as text; "" without one."""
        if self.target is None:
            return ""
        return "%s %s" % ("<=" if self.better == "low" else ">=", number(self.target.bound))

    def row(self):
        spread = "%s .. %s" % (number(min(self.values)), number(max(self.values)))
        return [
            self.workload,
            self.case,
            self.figure,
            self.unit,
            number(self.median),
            spread,
            self.goal,
            self.verdict,
            self.note,
        ]

    def json(self):
        line = dataclasses.asdict(self)
        line["target"] = self.target and self.target.bound
        line.update(median=self.median, min=min(self.values), max=max(self.values), verdict=self.verdict)
        return line


def number(value):
    """Three digits, without an exponent: 123456, 12.3, 0.0123."""
    if value == 0 or abs(value) >= 100:
        return "%.0f" % value
    return "%.3g" % value


def table(rows):
    """Rows of text under their columns, one figure a line."""
    rows = [COLUMNS] + rows
    widths = [max(map(len, column)) for column in zip(*rows)]
    layout = "  ".join("{:%s%d}" % (">" if name == "median" else "<", width) for name, width in zip(COLUMNS, widths))
    return "\n".join(layout.format(*row).rstrip() for row in rows)


def missed(figures):
    """(lines of text, number of failures): the figures that miss their targets, those with open targets last."""
    late = sorted((figure for figure in figures if figure.verdict in ("over", "under")), key=lambda figure: bool(figure.target.open_))
    failures = sum(not figure.target.open_ for figure in late)
    return [
        "  %s  %s, %s, %s: %s %s, has to be %s%s"
        % (
            "OPEN  " if figure.target.open_ else "MISSED",
            figure.workload,
            figure.case,
            figure.figure,
            number(figure.median),
            figure.unit,
            figure.goal,
            figure.target.open_ and " (%s)" % figure.target.open_,
        )
        for figure in late
    ], failures


def write(path, about, figures):
    """JSON lines: first what was run on what, then a figure a line."""
    with open(path, "w") as file:
        for line in [{"about": about}] + [figure.json() for figure in figures]:
            file.write(json.dumps(line) + "\n")


def read(path):
    """(about, {key: line}) of a file that `write` made."""
    about, lines = {}, {}
    with open(path) as file:
        for line in map(json.loads, file):
            if "about" in line:
                about = line["about"]
            else:
                lines[(line["workload"], line["case"], line["figure"], line["unit"])] = line
    return about, lines


def is_worse(figure, old):
    """Whether a figure is outside of the baseline's spread, on the bad side, and more than 10 % from its median."""
    if abs(figure.median - old["median"]) <= GRAIN.get(figure.unit, 0):
        return False
    if figure.better == "low":
        return figure.median > max(old["max"], old["median"] * WORSE)
    return figure.median < min(old["min"], old["median"] / WORSE)


def compare(figures, path, about):
    """(lines of text, number of figures that got worse) against a baseline file."""
    old_about, old = read(path)
    text, worse, common = [], 0, 0
    for name in ("python", "cpus", "machine", "quick"):
        if old_about.get(name) != about.get(name):
            text.append("  beware: %s was %s, is %s" % (name, old_about.get(name), about.get(name)))
    for figure in figures:
        before = old.get(figure.key)
        if before is None:
            continue
        if figure.workload == "machine":
            slower = figure.median / before["median"]
            text += ["  beware: this machine is %.2f times as slow as then" % slower] if abs(slower - 1) > 0.1 else []
            continue
        common += 1
        if is_worse(figure, before):
            worse += 1
            text.append(
                "  WORSE  %s, %s, %s: %s %s, was %s (%s .. %s)"
                % (
                    figure.workload,
                    figure.case,
                    figure.figure,
                    number(figure.median),
                    figure.unit,
                    number(before["median"]),
                    number(before["min"]),
                    number(before["max"]),
                )
            )
    text.insert(
        0, "against %s of %s: %d figures in common, %d worse" % (path, old_about.get("time", "?"), common, worse)
    )
    return text, worse
