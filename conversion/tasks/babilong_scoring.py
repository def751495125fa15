"""How answers to BABILong questions are judged: the two published scorers, and exact match."""

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")

# What the published scorers look for in an output, task by task.
TASK_LABELS: dict[str, tuple[str, ...]] = {
    "qa1": PLACES,
    "qa2": PLACES,
    "qa3": PLACES,
    "qa4": PLACES,
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    "qa6": ("no", "yes"),
    "qa7": ("none", "one", "three", "two"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa9": ("no", "yes"),
    "qa10": ("maybe", "no", "yes"),
    "qa11": PLACES,
    "qa12": PLACES,
    "qa13": PLACES,
    "qa14": ("bedroom", "cinema", "kitchen", "office", "park", "school"),
    "qa15": ("cat", "mouse", "sheep", "wolf"),
    "qa16": ("gray", "green", "white", "yellow"),
    "qa17": ("no", "yes"),
    "qa18": ("no", "yes"),
    "qa19": ("e,e", "e,n", "e,s", "n,e", "n,n", "n,w", "s,e", "s,s", "s,w", "w,n", "w,s", "w,w"),
    "qa20": ("bedroom", "bored", "garden", "hungry", "kitchen", "thirsty", "tired"),
}


def label_score(task: str, question: str, target: str, output: str) -> bool:
    """
    The leaderboard's verdict: the first sentence of `output` names the target's labels and no others.

    Labels are searched as substrings, whatever the case; those that the question names do not count. A target that
    lists several objects (`apple,milk`) must be named in full, in any order.

    Raises:
        KeyError: for a task without labels.
    """
    sentence = first_sentence(output)
    labels = {label.lower() for label in TASK_LABELS[task]}
    asked = {label for label in labels if label in question.lower()}
    named = {label for label in labels if label in sentence} - asked
    # Directions ("s,w") hold a comma but are one label.
    listed = "," in target and len(target) > 3
    return named == set(target.lower().split(",") if listed else [target.lower()])


def contains_score(target: str, output: str) -> bool:
    """The looser verdict: the first sentence of `output` contains the target, whatever else it says."""
    return target.lower() in first_sentence(output)


def exact_match(target: str, output: str, end: str | None = None) -> bool:
    """Whether `output`, cut where `end` (the end-of-text token) first stands, is the target and nothing else."""
    return (output.split(end)[0] if end else output).strip() == target


def first_sentence(output: str) -> str:
    """Lower-cased `output` up to a full stop or the mark-up of a further example."""
    text = output.lower()
    for end in (".", "<context>", "<example>"):
        text = text.split(end)[0]
    return text
