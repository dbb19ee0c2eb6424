"""Inputs that all targets share: hostile text, JSON of any shape, and plugin configurations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from kong_metering.events import EVENT_FIELDS

if TYPE_CHECKING:
    from tests.fuzz.cases import Case

TENANT = "x-tenant-id"
ARGUMENT = "tenant"
ATTRIBUTE = "x-plan"

_FIELD_NAMES = sorted({name for fields in EVENT_FIELDS.values() for name in fields})
TEXTS = [
    "",
    " ",
    "\t",
    "acme",
    "acme, globex",
    ", ",
    "caf\udce9",
    "\udcff\udcfe",
    "\udca0",
    "\udc85",
    "\ud800",
    "\u00a0",
    "\u2028",
    "\u202eacme",
    "\u200b",
    "\x00",
    "\x1b[31m",
    "consumer:b32379d9",
    "200",
    "-1",
    "1e3",
    "9" * 40,
    "UNSPECIFIED",
]
NUMBERS: list[float] = [
    0,
    1,
    -1,
    200,
    2**31,
    253_402_300_800_000,
    2**53,
    2**53 + 1,
    2**63,
    2**64,
    1e300,
    200.0,
    0.5,
    -0.0,
]

any_text = st.text(alphabet=st.characters(codec=None, categories=None), max_size=12)
raw_bytes = st.binary(max_size=12).map(lambda raw: raw.decode("utf-8", "surrogateescape"))
texts = st.sampled_from(TEXTS) | any_text | raw_bytes
numbers = st.integers() | st.floats() | st.sampled_from(NUMBERS)


def as_client_text(text: str) -> str:
    """Give what the host makes of the bytes of a text: two surrogates side by side may well be one character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")


def _comes_as_bytes(text: str) -> bool:
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


CLIENT_TEXTS = [text for text in TEXTS if _comes_as_bytes(text)]
# What the host makes of bytes from a client: surrogates stand for bytes that are not UTF-8, and nothing else.
client_texts = texts.filter(_comes_as_bytes) | st.binary(max_size=40).map(
    lambda raw: raw.decode("utf-8", "surrogateescape")
)
names = texts.filter(lambda text: text != "" and text.isprintable()) | st.just("a b")
scalars = st.none() | st.booleans() | numbers | texts


def json_values(max_leaves: int = 8) -> st.SearchStrategy[Any]:
    """Give anything that a JSON document may hold, with NaN and infinity, which lua-cjson may write too."""
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=max_leaves,
    )


attributes = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["header", "query"]),
        "look_up_value_in": st.sampled_from([ATTRIBUTE, TENANT, ARGUMENT, "X_Plan"]) | names,
        "event_property_name": st.sampled_from(["plan", *_FIELD_NAMES]) | names,
    }
)
subjects = st.one_of(
    st.just({"look_up_value_in": "header", "field": TENANT}),
    st.just({"look_up_value_in": "header", "field": "X_Tenant_ID"}),
    st.just({"look_up_value_in": "query", "field": ARGUMENT}),
    st.fixed_dictionaries(
        {"look_up_value_in": st.sampled_from(["consumer", "application"])},
        optional={"field": st.sampled_from(["id", "username", "custom_id"]) | names},
    ),
    st.fixed_dictionaries(
        {"look_up_value_in": st.sampled_from(["header", "query"]), "field": names},
    ),
)
configs: st.SearchStrategy[Case] = st.fixed_dictionaries(
    {"subject": subjects},
    optional={
        "attributes": st.lists(attributes, max_size=4),
        "meter_api_requests": st.booleans(),
        "meter_ai_token_usage": st.booleans(),
        "allow_status_codes": st.sampled_from([["200-299"], ["100-199", "400-599"], []]),
    },
)


def whole_config(config: Case) -> Case:
    """Add what every configuration has."""
    always = {
        "__plugin_id": "276df434-3e72-5032-b483-19156b86f1ca",
        "ingest_endpoint": "https://openmeter.example/api/v1/events",
        "api_token": "om_token",
    }
    return {**always, **config}
