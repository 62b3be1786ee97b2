"""Runs a stranger's Jinja template so that it ends.

Jinja's immutable sandbox keeps a template from Python's internals, not from `{% for i in range(10**9) %}` or from
`'a' * 10**10`. Here every step is paid from a budget (fuel for steps, characters and items made; and a deadline), and
whatever could make something large in one step says first how large. No signals, threads or traces: it holds in
any thread on any OS. What pays, and where:

    loop            before it starts: items x (nodes and literal text of its body)    `(each)`, put into the syntax tree
    macro           each call: nodes and literal text of its body; depth is bounded   `(step)`, put into the syntax tree
    literal, slice  its size                                                          `(made)`, put into the syntax tree
    a == b, a[b]    one step (the clock is read)                                       `(step)`
    a ~ b           its size, before it is made                                        `(concat)`, for Jinja's operator
    + * % **        their size, before it is made                                      `call_binop`
    call, filter    the result; `join`, `replace`, `indent` ... say their size first   `call`, `_PRICES`
    {{ output }}    its text                                                           `finalize`

Containers hold only plain data (text, numbers, lists, dictionaries) and their size counts shared parts each time, so
that `[[x, x], [x, x]]` cannot hide an exponential text. Names with parentheses cannot be written in a template.

Bounded are steps, characters made, wall time and so memory. A single step's time is not measured but linear in what was
paid for (sorting: n log n), and the clock is read after it.
"""

from __future__ import annotations

import json
import operator
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from types import BuiltinMethodType, MethodType
from typing import Any, NoReturn

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2 import TemplateError as JinjaError
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from smolrun.errors import TemplateError

MAX_SOURCE = 64 << 10  # characters; the longest template known to us (gpt-oss) has 17,000
MAX_SECONDS = 5.0
FUEL = 8_000_000  # steps + characters made
FUEL_PER_CHARACTER = 32  # more for long messages, which the template did not choose
MAX_DEPTH = 64  # macros in macros, containers in containers
MAX_BITS = 4096  # of an integer
CALL = 100  # fuel for a call: some 5 us, as long as 100 steps
ITEM = 8  # fuel for an item of a container: a pointer costs more memory than a character

_BUDGET = "(budget)"  # a context variable no template can name

_PLAIN = (str, int, float, bool, type(None))
_PRINTABLE = (*_PLAIN, list, tuple, dict, range, Undefined)
_Made: type = type(iter([]))  # what lazy filters give


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ATTRIBUTES: dict[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace "
        "istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
        "rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    dict: _words("get items keys values"),
    list: _words("count index"),
    tuple: _words("count index"),
    LoopContext: _words(
        "changed cycle depth depth0 first index index0 last length nextitem previtem revindex revindex0"
    ),
}
_NODES = _words(
    "Template Output TemplateData For If Assign AssignBlock Macro CallBlock FilterBlock With ExprStmt Break "
    "Continue Name NSRef Const List Tuple Dict Pair Keyword CondExpr Filter Test Call Getattr Getitem Slice Concat "
    "Compare Operand Add Sub Mul Div FloorDiv Mod Pow And Or Not Neg Pos"
)


class Budget:
    """Fuel and time of one rendering."""

    def __init__(self, fuel: int) -> None:
        self.fuel = fuel
        self.depth = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def pay(self, cost: int) -> None:
        """Takes `cost`; raises SecurityError when fuel or time is out."""
        self.fuel -= cost
        if self.fuel < 0:
            raise SecurityError("the chat template makes too much or takes too many steps: it is broken or hostile")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"the chat template ran for more than {MAX_SECONDS:g} s: it is broken or hostile")

    def pay_for(self, value: Any) -> Any:
        """Takes the size of a new value and gives it back."""
        self.pay(self.size(value))
        return value

    def size(self, value: Any, depth: int = 0) -> int:
        """Characters and items of plain data, shared parts counted each time; 1 for what is no container."""
        kind = type(value)
        if kind is str:
            return 1 + len(value)
        if kind is int:
            if value.bit_length() > MAX_BITS:
                raise SecurityError(f"the chat template makes an integer of more than {MAX_BITS} bits")
            return 1
        if kind is range:
            return 1 + ITEM * len(value)
        if kind not in (list, tuple, dict):
            if depth and kind not in _PLAIN and not isinstance(value, Undefined):
                raise SecurityError(f"the chat template puts a {kind.__name__} into a container, plain data expected")
            return 1
        if depth > MAX_DEPTH:
            raise SecurityError(f"the chat template nests containers deeper than {MAX_DEPTH}")
        total = ITEM
        for item in value.items() if kind is dict else value:
            total += ITEM + self.size(item, depth + 1)
            if total > self.fuel:
                break  # `pay` will refuse it; what is shared exponentially is not walked to its end
        return total


def _budget(context: Context) -> Budget:
    budget = context.resolve_or_missing(_BUDGET)
    assert isinstance(budget, Budget)
    return budget


# ---- pieces put into the syntax tree


class _Pay(NodeTransformer):
    """Writes the payments into a parsed template."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        name = type(node).__name__
        if name not in _NODES:
            raise SecurityError(f"line {node.lineno}: {name} is not allowed in a chat template")
        cost = _cost(node) if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)) else 0
        super().generic_visit(node, *args, **kwargs)
        match node:
            case nodes.For():
                if node.recursive:
                    raise SecurityError(f"line {node.lineno}: recursive loops are not allowed in a chat template")
                node.iter = _filter(node.iter, "(each)", nodes.Const(cost))
            case nodes.Macro() | nodes.CallBlock():
                node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), "(step)", nodes.Const(cost))))
            case nodes.Concat():
                return _filter(node.nodes[0], "(concat)", *node.nodes[1:])
            case nodes.List() | nodes.Dict() | nodes.Getitem(arg=nodes.Slice()):
                return _filter(node, "(made)")
            case nodes.Tuple(ctx="load"):
                return _filter(node, "(made)")
            case nodes.Compare() | nodes.Getitem():
                return _filter(node, "(step)", nodes.Const(1))
        return node


def _filter(node: nodes.Node, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _cost(node: nodes.Node) -> int:
    """Nodes and literal text of one run of a body; a loop or macro within pays for itself."""
    cost = 1
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.TemplateData):
            cost += len(child.data)
        cost += 1 if isinstance(child, (nodes.For, nodes.Macro, nodes.CallBlock)) else _cost(child)
    return cost


@pass_context
def _each(context: Context, items: Any, cost: int) -> Any:
    kind = type(items)
    if kind in (str, list, tuple, dict, range):
        count = len(items)
    elif isinstance(items, Undefined):
        count = 0
    elif (count := operator.length_hint(items, -1)) < 0:
        raise SecurityError(f"the chat template loops over a {kind.__name__}, plain data expected")
    _budget(context).pay(cost * count + 1)
    return items


@pass_context
def _step(context: Context, value: Any, cost: int) -> Any:
    _budget(context).pay(cost)
    return value


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _budget(context).pay_for(value)


@pass_context
def _concat(context: Context, *parts: Any) -> str:
    budget = _budget(context)
    for part in parts:
        budget.pay_for(_text(part))
    return str_join(parts)


def _text(value: Any) -> Any:
    """The value, if it may become text: str() of anything else could be large, or tell of Python's insides."""
    if isinstance(value, _PRINTABLE):
        return value
    raise SecurityError(f"the chat template prints a {type(value).__name__}, text expected")


# ---- filters and tests: those of Jinja that a chat may need and that cannot grow unseen


def _count(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else operator.length_hint(value)


def _before_replace(budget: Budget, text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    old, new, text = str(old), str(new), str(text)
    budget.pay(len(text) + text.count(old) * len(new))


def _before_join(budget: Budget, items: Any, d: Any = "", *_: Any, **__: Any) -> None:
    budget.pay(_count(items) * len(str(d)))


def _before_indent(budget: Budget, text: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    budget.pay((len(str(text).splitlines()) + 1) * (len(width) if isinstance(width, str) else int(width) + 1))


def _before_round(budget: Budget, value: Any, precision: Any = 0, *_: Any, **__: Any) -> None:
    if abs(int(precision)) > 15:
        raise SecurityError("the chat template rounds to more than 15 digits")


def _before_format(budget: Budget, template: Any, *values: Any, **named: Any) -> None:
    """% with a width such as %99999999d would make text from nothing."""
    left = re.sub(r"%(?:%|[-+ #0]?\d{0,3}(?:\.\d{1,3})?[sdiuxXofFeEgGrc])", "", str(template))
    if "%" in left or named:
        raise SecurityError("the chat template formats with more than %s, %d, %5.2f and the like")
    budget.pay(len(str(template)) + str(template).count("%") * 1000)
    for value in values:
        budget.pay_for(_text(value))


def _before_split(budget: Budget, text: Any, sep: Any = None, *_: Any, **__: Any) -> None:
    budget.pay(ITEM * (text.count(sep) if isinstance(sep, str) and sep else len(text)))


def _before_list(budget: Budget, items: Any, *_: Any, **__: Any) -> None:
    budget.pay(ITEM * _count(items))


def _before_sum(budget: Budget, items: Any, attribute: Any = None, start: Any = 0) -> None:
    if not isinstance(start, (int, float)):
        raise SecurityError("the chat template sums what are no numbers")  # sum of lists is quadratic


def _before_tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: Any = False,
    indent: Any = None,
    separators: Any = None,
    *_: Any,
    **__: Any,
) -> None:
    width = (len(indent) if isinstance(indent, str) else max(int(indent), 0)) if indent is not None else 0
    each = width * _depth(value) + (len("".join(separators)) if separators is not None else 2)
    budget.pay(budget.size(value) // ITEM * each)


def _depth(value: Any) -> int:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return 1 + max(map(_depth, items), default=0)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As Hugging Face defines it: Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# called before the filter of that name, with its arguments: so the parameters are named as the filter's
_PRICES: dict[str, Callable[..., None]] = {
    "replace": _before_replace,
    "join": _before_join,
    "indent": _before_indent,
    "list": _before_list,
    "tojson": _before_tojson,
    "round": _before_round,
    "format": _before_format,
    "sum": _before_sum,
}
_KEPT_FILTERS = _words(
    "abs capitalize count d default dictsort first float format indent int items join last length list lower map "
    "max min reject rejectattr replace reverse round select selectattr sort string sum title trim truncate unique "
    "upper wordcount"
)
_KEPT_TESTS = _words(
    "!= < <= == > >= boolean callable defined divisibleby eq equalto even false float ge greaterthan gt in integer "
    "iterable le lessthan lower lt mapping ne none number odd sameas sequence string true undefined upper"
)
_ANY_VALUE = _KEPT_TESTS - {"lower", "upper"} | {"default", "d"}  # these never make text of their value


def _paying(name: str, function: Callable[..., Any], price: Callable[..., None] | None) -> Callable[..., Any]:
    """A filter or test of Jinja that pays for its result; given the context, it does not run while compiling."""
    wanted = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def paying(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.pay(1)
        if name not in _ANY_VALUE:
            for given in (value, *args, *kwargs.values()):
                if not isinstance(given, _Made):
                    _text(given)
        if price is not None:
            price(budget, value, *args, **kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        lead = () if wanted is None else (first[wanted.name],)
        result = function(*lead, value, *args, **kwargs)
        if isinstance(result, Iterator):
            made = []
            for item in result:
                budget.pay(ITEM)
                made.append(item)
            budget.pay_for(made)
            return iter(made)  # true even if empty and without length, as Jinja's generator was
        return budget.pay_for(result)

    paying.__name__ = name
    return paying


# ---- the environment


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for Hugging Face's masks; the text is the same without it."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Refusal(JinjaError):
    """The template called raise_exception."""


def _raise_exception(message: Any = "") -> NoReturn:
    raise Refusal(str(_text(message))[:1000])


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self) -> None:
        # trim_blocks, lstrip_blocks, loop controls and `tojson` as Hugging Face's apply_chat_template has them;
        # not optimized: constants are computed while rendering, under the budget
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        safe_range = self.globals["range"]
        self.globals = {"range": safe_range, "dict": dict, "namespace": Namespace, "raise_exception": _raise_exception}
        self._callables = tuple(self.globals.values())
        kept: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in sorted(_KEPT_FILTERS)} | {
            "tojson": _tojson,
            "safe": str,
        }
        self.filters = {name: _paying(name, f, _PRICES.get(name)) for name, f in kept.items()}
        self.filters |= {"(each)": _each, "(step)": _step, "(made)": _made, "(concat)": _concat}
        tests: dict[str, Any] = dict(TESTS)
        self.tests = {name: _paying(name, tests[name], None) for name in sorted(_KEPT_TESTS)}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, Namespace) or attr in _ATTRIBUTES.get(type(obj), ())

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(__context)
        budget.pay(CALL + ITEM * (len(args) + len(kwargs)))
        if isinstance(__obj, (BuiltinMethodType, MethodType)):
            owner, name = __obj.__self__, __obj.__name__
            if name not in _ATTRIBUTES.get(type(owner), ()):
                raise SecurityError(f"the chat template calls {name!r} of a {type(owner).__name__}: not allowed")
            if name == "join":
                _before_join(budget, *args, owner)
            elif name == "replace":
                _before_replace(budget, owner, *args)
            elif name in ("split", "rsplit", "splitlines"):
                _before_split(budget, owner, *args, **kwargs)
        elif not (isinstance(__obj, (Macro, Undefined)) or any(__obj is known for known in __self._callables)):
            raise SecurityError(f"the chat template calls a {type(__obj).__name__}: not allowed")
        budget.depth += 1
        if budget.depth > MAX_DEPTH:
            raise SecurityError(f"the chat template calls macros deeper than {MAX_DEPTH}")
        result = super().call(__context, __obj, *args, **kwargs)
        budget.depth -= 1
        if type(result) in (type({}.keys()), type({}.values()), type({}.items())):
            result = list(result)  # a view in a list would hide its size
        return budget.pay_for(result)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, list, tuple)) and isinstance(times, int):
                    budget.pay(budget.size(many) * max(times, 0))
        elif operator == "+" and isinstance(left, (str, list, tuple)):
            budget.pay(_count(left) + (_count(right) if isinstance(right, (str, list, tuple)) else 0))
        elif operator == "%" and isinstance(left, str):
            _before_format(budget, left, *(right if isinstance(right, tuple) else (right,)))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            bits = abs(right) * left.bit_length()
            budget.pay(bits if bits <= MAX_BITS else budget.fuel + 1)
        return budget.pay_for(super().call_binop(context, operator, left, right))


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    return _budget(context).pay_for(_text(value))


_environment = _Environment()


def compile_template(source: str) -> Template:
    """A template that can only be run by `run`.

    Raises:
        TemplateError: too long, no Jinja, or something a chat template has no use for.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"chat template: {len(source):,} characters found, at most {MAX_SOURCE:,} expected")
    try:
        return _environment.from_string(_Pay().visit(_environment.parse(source)))
    except Exception as error:  # nesting gives RecursionError, MemoryError or SyntaxError, numbers ValueError
        raise TemplateError(f"chat template: {_says(error)}") from error


def run(template: Template, variables: Mapping[str, Any], *, characters: int) -> str:
    """Renders; ends within the budget whatever the template does.

    Args:
        variables: plain data only (str, int, float, bool, None, list, dict).
        characters: size of the variables; the budget grows with it.

    Raises:
        TemplateError: the template refused the messages, failed, or ran out of its budget.
    """
    budget = Budget(FUEL + FUEL_PER_CHARACTER * characters)
    try:
        return template.render({**variables, _BUDGET: budget})
    except Refusal as refusal:
        raise TemplateError(f"the chat template refuses these messages: {refusal.message}") from None
    except Exception as error:  # a template may do anything wrong, from 1/0 to a recursion
        raise TemplateError(f"chat template: {_says(error)}") from error


def _says(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return f"{f'line {line}: ' if line else ''}{type(error).__name__}: {str(error)[:300]}"
