"""What each card trains, by plan.py's formulas."""

from experiments.report.table_tools import gigabytes, made_on, markdown, table

TOLD = ("batch_size", "gradient_accumulation_steps", "block_size", "init_from")  # by other columns


def short(tokens):
    """1,048,576 -> 1.0M, 42,496 -> 42k; a dash where nothing fits."""
    if not tokens:
        return "–"
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens / 1e3:.0f}k"


@table("plan_cards", "plan_cards.csv")
def plan_cards(rows):
    """The longest context by model and card."""
    return by_card(rows, list(dict.fromkeys(row["card_GB"] for row in rows)))


@table("front_cards", "plan_cards.csv")
def front_cards(rows):
    """The same for some cards: a table that a narrow screen holds."""
    return by_card(rows, (8, 16, 24, 80))


def by_card(rows, cards):
    """A row a model, a column a card."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["model"], row["card_GB"]): short(row["longest"]) for row in rows}
    return markdown(
        ["model", *(f"{card} GB" for card in cards)],
        [[model, *(cells[model, card] for card in cards)] for model in models],
    )


@table("plan_flags", "plan_cards.csv")
def plan_flags(rows):
    """The fastest plan's flags at the usual length, and the peak."""
    lines = []
    for row in rows:
        if row["flags"]:
            tokens = f"{row['sequences']} × {row['length']:,}"
            what = f"{row['model']}, {tokens}"
            lines.append(
                [
                    f"{row['card_GB']} GB: {what}",
                    in_code(row["flags"]),
                    gigabytes(row["peak"] / 1e9),
                ]
            )
    return markdown(["card: model, tokens a step", "flags", "peak"], lines, words=2) + made_on(rows)


def in_code(flags):
    """The flags of a plan that no other column tells, after how the batch is cut."""
    settings = dict(flag.removeprefix("--").split("=", 1) for flag in flags.split())
    words = [f"`{name}={value}`" for name, value in settings.items() if name not in TOLD]
    pieces = settings.get("gradient_accumulation_steps", "1")
    if pieces != "1":
        words.insert(0, f"{pieces} × {settings['batch_size']} sequences")
    return ", ".join(words) or "none"


@table("plan_checked", "plan_cards_checked.csv")
def plan_checked(rows):
    """Plans that were trained on a GPU whose allocator had a card's memory and no more."""
    lines = [
        [
            f"{row['model']} on {row['card_GB']} GB, {row['goal']}",
            f"{row['length']:,}",
            f"{row['predicted'] / 1e9:.3f} GB",
            f"{row['measured'] / 1e9:.3f} GB",
            "yes" if row["outcome"] == "fits" else "no",
            f"{row['tokens_per_s']:,}" if row["tokens_per_s"] else "–",
        ]
        for row in rows
    ]
    header = ["plan", "tokens a sequence", "predicted", "measured", "fits", "tokens/s"]
    return markdown(header, lines) + made_on(rows)
