"""Collections of votes by name: a workflow names one, and a run description holds its folder."""

from ...trainer.objectives import OBJECTIVES
from ...trainer.utils.errors import BadInput
from ...trainer.votes import store
from .folders import votes_folder

COLLECTION = "my_votes"


def collection_folder(name: str) -> str:
    """The folder of a collection.

    Raises:
        BadInput: the name cannot be one, or there is no such collection.
    """
    return str(store.find(votes_folder(), name).folder)


def with_collection(objective: dict) -> dict:
    """The section `objective` with the folder of the collection that it names; as it is where it names none.

    Raises:
        BadInput: there is no such collection; a path is none.
    """
    fields = OBJECTIVES[objective["name"]].Options.model_fields
    extras = {name: field.json_schema_extra for name, field in fields.items()}
    named = [name for name, extra in extras.items() if isinstance(extra, dict) and extra.get("votes") == "collection"]
    try:
        return objective | {name: collection_folder(objective[name]) for name in named if objective[name]}
    except BadInput as error:
        raise BadInput(f"objective.collection: {error}") from error
