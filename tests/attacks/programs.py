"""Hostile pickles: what each one tries, and what becomes of it in a file of ours and in one of torch.save.

A verdict is the middle of the sentence with which opening the file ends: ``a.ckpt cannot be read: <verdict>.``;
`CODE` means that the file is refused by the name of what it asks for, `HARMLESS` that it opens and nothing
happens. In a file of torch.save an unknown class is harmless: it becomes an inert object that says its name.
"""

from __future__ import annotations

import pickle
import struct
from typing import NamedTuple

from .assembler import (
    CANARY,
    call,
    get,
    name,
    number,
    program,
    put,
    sizes,
    storage,
    tensor,
    text,
    tuple_of,
    under,
)

HARMLESS = "it opens, and nothing happens"
CODE = "it asks for code"
NOT_A_NAME = "it names something by what is not a name"
NO_CONTAINER = "it changes something that is not a container"
TOO_LARGE_A_KEY = "a key has more than 10000 parts"
COPIES = "it makes copies out of all proportion to its size"
NO_SIZE = "a tensor has a size that is not one"
ENDS = "it ends in the middle"


class Program(NamedTuple):
    """One pickle."""

    what: str
    data: bytes
    own: str
    foreign: str
    storages: tuple[bytes, ...] = ()


def _code(what: str, value: bytes, foreign: str = HARMLESS, storages: tuple[bytes, ...] = ()) -> Program:
    return Program(what, under(value), CODE, foreign, storages)


def _bad(
    what: str, data: bytes, verdict: str, foreign: str = "", storages: tuple[bytes, ...] = ()
) -> Program:
    return Program(what, data, verdict, foreign or verdict, storages)


RUN = call("posix.system", text(CANARY))
METADATA = text("_metadata")


def _opcode(code: int) -> str:
    return f"opcode {code:#04x} at byte {{at}} has no place in a checkpoint"


CODE_IN_EVERY_POSITION = [
    _code("REDUCE", RUN),
    _code("INST", b"(" + text(CANARY) + b"iposix\nsystem\n"),
    _code("OBJ", b"(" + name("posix.system") + text(CANARY) + b"o"),
    _code("NEWOBJ", name("posix.system") + tuple_of(text(CANARY)) + b"\x81"),
    _code("NEWOBJ_EX", name("posix.system") + tuple_of(text(CANARY)) + b"}\x92"),
    _code("STACK_GLOBAL", text("posix") + text("system") + b"\x93" + tuple_of(text(CANARY)) + b"R"),
    _code("BUILD", name("posix.system") + b")\x81" + b"}" + text("x") + RUN + b"sb"),
    _code("eval", call("builtins.eval", text(f"__import__('os').system('{CANARY}')"))),
    _code("exec", call("builtins.exec", text(f"import os; os.system('{CANARY}')"))),
    _code("__import__", call("builtins.__import__", text("canary_module"))),
    _code("a class of a module that runs code", name("canary_module.Thing")),
    _code("open", call("builtins.open", text("canary"), text("w"))),
    _code("getattr of an allowed one", call("builtins.getattr", name("collections.OrderedDict"), text("__init__"))),
    _code("partial", call("functools.partial", name("posix.system"), text(CANARY)) + b")R"),
    _code("a pickle in a pickle", call("torch.storage._load_from_bytes", text(CANARY))),
    _code("apply", call("builtins.map", name("posix.system"), b"]" + text(CANARY) + b"a")),
    _code("a subprocess", call("subprocess.Popen", text(CANARY))),
    _code("a dotted name", b"\x80\x04" + text("torch") + text("os.system") + b"\x93" + tuple_of(text(CANARY)) + b"R"),
    _code("torch's own names", call("torch._utils._rebuild_device_tensor_from_numpy", RUN), HARMLESS),
    _code("numpy.load", call("numpy.load", text("canary"))),
    _code("in a list", b"]" + RUN + b"a"),
    _code("in a tuple", RUN + b"\x85"),
    _code("in a set", b"\x8f(" + RUN + b"\x90"),
    _code("as a key", b"}" + RUN + b"Ns"),
    _code("twenty lists down", b"]" * 20 + RUN + b"a" * 20),
    _code("as a tensor's size", tensor(size=RUN), "a tensor is put together from something that is not a storage",
          (b"\0" * 4,)),
    _code("as a tensor's storage", call("torch._utils._rebuild_tensor_v2", RUN, b"K\0", b")", b")", b"\x89", b"}"),
          "a NoneType is not a dtype"),
    _code("in a tensor's hooks", call("torch._utils._rebuild_tensor_v2", storage(), b"K\0", b")", b")", b"\x89",
          call("collections.OrderedDict") + b"K\0" + name("posix.system") + b"s"), HARMLESS, (b"\0" * 4,)),
    _code("as a storage's class", tensor(kind="posix.system"), "a tuple does not refer to a storage"),
    _code("as what rebuilds a subclass", call("torch._tensor._rebuild_from_type_v2", name("posix.system"),
          name("torch.Tensor"), tuple_of(text(CANARY)), b"}"),
          "a tensor is put together by something that does not make tensors"),
    _code("in the state of a Parameter", call("torch._utils._rebuild_parameter_with_state", tensor(), b"\x89",
          call("collections.OrderedDict"), RUN), HARMLESS, (b"\0" * 4,)),
    _code("in the metadata of a state_dict", call("collections.OrderedDict") + b"}" + METADATA + RUN + b"sb"),
    _code("in the state of a dict subclass", name("canary_module.Dict") + b")R}" + text("x") + RUN + b"sb"),
    _code("as a factory", call("collections.defaultdict", name("posix.system"))),
    _code("in a persistent id", RUN + b"Q", "a system does not refer to a storage"),
    _bad("an extension code", under(b"\x82\x01"), "opcode 0x82 at byte 9 has no place in a checkpoint"),
    _bad("a persistent id as text", under(b"Pcanary\n"), "opcode 0x50 at byte 9 has no place in a checkpoint"),
    _bad("a buffer out of band", under(b"\x97"), "opcode 0x97 at byte 9 has no place in a checkpoint"),
    _bad("STACK_GLOBAL with numbers", under(b"K\1K\1\x93"), NOT_A_NAME),
]  # fmt: skip

FUNCTION = name("torch._utils._rebuild_tensor_v2")
AS_WRITTEN = (
    FUNCTION + b"q\x140" + text("storage") + b"q\x150" + name("torch.FloatStorage") + b"q\x160" + text("cpu")
    + b"q\x170" + name("collections.OrderedDict") + b"q\x180h\x14((h\x15h\x16" + text("0") + b"q\x30h\x17K\1tq\x31QK\0"
    + b"K\1\x85q\x32K\1\x85q\x33\x89h\x18)Rq\x34tq\x35Rq\x09"
)  # fmt: skip
"""A tensor in the very opcodes that picklers use, into slot 9."""
CHANGES = [
    _bad("defaults of a function", under(FUNCTION + b"}" + text("__defaults__") + b")sb"), NO_CONTAINER),
    _bad("a slot of a function", under(FUNCTION + b"N}" + text("_function") + b"Ns\x86b"), NO_CONTAINER),
    _bad("a storage's dtype", under(storage() + b"N}" + text("dtype") + name("torch.float64") + b"s\x86b"),
         NO_CONTAINER, storages=(b"\0" * 4,)),
    _bad("a tensor's hooks", under(tensor() + tuple_of(b"\x89", b"N", call("collections.OrderedDict")) + b"b"),
         NO_CONTAINER, storages=(b"\0" * 4,)),
    _bad("a tensor's elements", under(tensor() + b"K\0K\1s"), NO_CONTAINER, storages=(b"\0" * 4,)),
    _bad("a tensor's size", under(tensor() + put(9) + tuple_of(get(9), b"K\0", sizes(1 << 34), sizes(1)) + b"b"),
         NO_CONTAINER, storages=(b"\0" * 4,)),
    _bad("a tensor's size, under a slot that was used before",
         under(b"}" + put(9) + b"0" + tensor() + put(9) + tuple_of(get(9), b"K\0", sizes(1 << 34), sizes(1)) + b"b"),
         NO_CONTAINER, storages=(b"\0" * 4,)),
    _bad("a tensor's size, as picklers write it", under(AS_WRITTEN + tuple_of(
         get(9), b"K\0", sizes(1 << 34), sizes(1)) + b"b"), NO_CONTAINER, storages=(b"\0" * 4,)),
    _bad("a tensor's size, under the slot of an object", under(
         name("canary_module.Thing") + b")Rq\x090" + AS_WRITTEN + b"0h\x09" + tuple_of(
         get(9), b"K\0", sizes(1 << 34), sizes(1)) + b"b"), NO_CONTAINER, storages=(b"\0" * 4,)),
    _bad("a tensor's size, under the slot of a state_dict", under(
         call("collections.OrderedDict") + b"q\x090" + AS_WRITTEN + b"0h\x09}(" + get(9) + b"NK\0N" + sizes(1 << 34)
         + b"N" + sizes(1) + b"Nub"), NO_CONTAINER, storages=(b"\0" * 4,)),
    Program("nothing: a tensor as picklers write it", under(AS_WRITTEN), HARMLESS, HARMLESS, (b"\0" * 4,)),
    _bad("a path's text", under(call("pathlib.PosixPath", text("p")) + b"N}" + text("_str") + b"Ns\x86b"),
         NO_CONTAINER),
    _bad("a method of a state_dict", under(call("collections.OrderedDict") + b"}" + text("items") + b"Nsb"),
         "it gives an OrderedDict attributes that none has"),
    _bad("the class of a state_dict", under(call("collections.OrderedDict") + b"N}" + text("__class__") + b"Ns\x86b"),
         "it gives an OrderedDict attributes that none has"),
    _bad("a list into itself", under(b"]N\x61" + put(1) + call("builtins.slice", b"K\0", b"K\0") + get(1) + b"s"),
         NO_CONTAINER),
    _bad("a class", under(name("canary_module.Thing") + b"}b"), NO_CONTAINER),
]  # fmt: skip


def _doubled(first: bytes, times: int, join: bytes = b"\x86") -> bytes:
    """Each level holds the one before it twice."""
    return first + b"".join(put(100 + n) + get(100 + n) + join for n in range(times))


TUPLES = _doubled(b")", 80)
LISTS = b"]" + b"".join(put(100 + n) + b"0](" + get(100 + n) * 2 + b"e" for n in range(80))
LONG_TEXT = text("x" * 50_000)
LONG_LIST = b"](" + b"N" * 20_000 + b"e"


def _again(first: bytes, each: bytes, times: int = 5000) -> bytes:
    """A large value, and many calls that copy it."""
    return under(first + put(1) + b"0](" + each * times + b"e")


BOMBS = [
    _bad("a memo slot", under(b"Nr\xff\xff\xff\x7f"), "memo slot 2147483647 is out of proportion to 17 bytes"),
    _bad("a memo slot as text", under(b"Np99999999999\n"), "memo slot b'99999999999' is out of proportion to 25 bytes"),
    _bad("BINBYTES8", program(b"\x8e\0\0\0\0\xff\0\0\0"), "byte 1095216660491 lies beyond its end"),
    _bad("BYTEARRAY8", program(b"\x96\0\0\0\0\xff\0\0\0"), "byte 1095216660491 lies beyond its end"),
    _bad("BINUNICODE8", program(b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f"),
         "byte 9223372036854775818 lies beyond its end"),
    _bad("BINUNICODE", program(b"X\xff\xff\xff\x7f"), "byte 2147483654 lies beyond its end"),
    _bad("LONG4", program(b"\x8b\xff\xff\xff\x7f"), "byte 2147483654 lies beyond its end"),
    _bad("LONG4, negative", program(b"\x8b\xff\xff\xff\xff"), "byte 6 lies beyond its end"),
    _bad("FRAME", program(b"\x95\0\0\0\0\xff\0\0\0N"), "a frame of 1095216660480 bytes lies beyond its end"),
    _bad("digits without end", under(b"I" + b"9" * 6000 + b"\n"),
         "a number of 6000 digits has no place in a checkpoint"),
    _bad("nothing", b"", ENDS),
    _bad("no end", b"\x80\x02N", ENDS),
    _bad("text", b"hello", "memo slot 101 is empty"),
    _bad("an empty stack", program(b"R"), "it ends in the middle, or uses more than it made"),
    _bad("no mark", program(b"t"), "it ends in the middle, or uses more than it made"),
    _bad("a key that takes 2 to the 80 steps to hash", under(b"}" + TUPLES + b"Ns"), TOO_LARGE_A_KEY),
    _bad("such a member of a set", under(b"\x8f(" + TUPLES + b"\x90"), TOO_LARGE_A_KEY),
    _bad("such a member of a frozenset", under(b"(" + TUPLES + b"\x91"), TOO_LARGE_A_KEY),
    _bad("such a member of a set that is called", under(call("builtins.set", b"]" + TUPLES + b"a")),
         TOO_LARGE_A_KEY),
    _bad("such a member of a frozenset that is called", under(call("builtins.frozenset", b"]" + TUPLES + b"a")),
         TOO_LARGE_A_KEY),
    _bad("such a key of an OrderedDict", under(call("collections.OrderedDict", b"]" + TUPLES + b"N\x86a")),
         TOO_LARGE_A_KEY),
    _bad("such a key of a DICT", under(b"(" + TUPLES + b"Nd"), TOO_LARGE_A_KEY),
    _bad("a key that overflows the stack when it is hashed", under(b"})" + b"\x85" * 100_000 + b"Ns"),
         TOO_LARGE_A_KEY),
    _bad("a large key again and again",
         under(b"}(" + b"N" * 5000 + b"t" + put(1) + b"Ns" + (get(1) + b"Ns") * 20_000),
         "its keys are out of proportion to its size"),
    _bad("a number of a million bits as a key",
         under(b"}\x8b" + struct.pack("<i", 125_000) + b"\x01" * 125_000 + b"Ns"), TOO_LARGE_A_KEY),
    _bad("DUP", under(b")" + b"2\x86" * 80), "opcode 0x32 at byte 10 has no place in a checkpoint"),
    Program("a value that is 2 to the 80 lists", under(LISTS), HARMLESS, HARMLESS),
    Program("a value that is 2 to the 80 tuples", under(TUPLES), HARMLESS, HARMLESS),
    Program("the text of such a list", under(call("builtins.str", LISTS)), CODE,
            "a str is made of something that is not a plain value"),
    Program("a thousand lists deep", under(b"]" * 1000 + b"a" * 999), HARMLESS, HARMLESS),
    Program("a hundred thousand tuples deep", under(b")" + b"\x85" * 100_000), HARMLESS, HARMLESS),
    Program("a hundred thousand lists deep, with an unknown class",
            under(b"]" * 100_000 + name("canary_module.X") + b")R" + b"a" * 100_000), CODE,
            "it is nested more than 400 levels deep"),
    Program("40,000 empty lists", under(b"](" + b"]" * 40_000 + b"e"), HARMLESS, HARMLESS),
    Program("40,000 empty sets", under(b"](" + b"\x8f" * 40_000 + b"e"), HARMLESS, HARMLESS),
    _bad("bytearray of a number", under(call("builtins.bytearray", number(1 << 30))),
         "a collection is made of something that is not one"),
    _bad("bytes of a number", under(call("builtins.bytes", number(1 << 30))),
         "a collection is made of something that is not one"),
    _bad("encoding one text again and again",
         _again(LONG_TEXT, call("_codecs.encode", get(1), text("latin1"))), COPIES),
    _bad("a set of one list again and again", _again(LONG_LIST, call("builtins.set", get(1))), COPIES),
    _bad("an OrderedDict of one dict again and again",
         _again(b"}(" + b"".join(number(n) + b"N" for n in range(2000)) + b"u",
                call("collections.OrderedDict", get(1))), COPIES),
    Program("a deque of one list again and again", _again(LONG_LIST, call("collections.deque", get(1))), CODE, COPIES),
    Program("a list of one tuple again and again",
            _again(b"(" + b"N" * 100_000 + b"t", call("builtins.list", get(1)), 2000), CODE,
            "a list is made of 100000 values"),
    Program("an array of one text of bytes again and again", _again(
        b"B" + struct.pack("<I", 100_000) + b"x" * 100_000,
        call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), b"K\0\x85", b"N")
        + tuple_of(b"K\1", number(100_000) + b"\x85", call("numpy.dtype", text("u1")), b"\x89", get(1)) + b"b",
        5000), CODE, COPIES),
    Program("a path of one text again and again", _again(LONG_TEXT, call("pathlib.PosixPath", get(1))), CODE, COPIES),
    Program("a number from digits again and again", _again(LONG_TEXT, call("builtins.float", get(1))), CODE,
            "a float is made of 50000 values"),
    Program("ten thousand and one classes", under(b"](" + b"".join(f"ccanary\nC{n}\n".encode() for n in range(10_001)) + b"e"),
            CODE, "it names more than 10000 classes"),
    Program("a config that holds itself twice, 60 levels down", under(
        b"N" + b"".join(
            put(100 + n) + b"0" + name("omegaconf.dictconfig.DictConfig") + b")\x81}" + text("_content") + b"}"
            + text("a") + get(100 + n) + b"s" + text("b") + get(100 + n) + b"ssb"
            for n in range(60))), CODE, COPIES),
    Program("a cycle", under(b"]" + put(1) + get(1) + b"a"), HARMLESS, HARMLESS),
    Program("a cycle through an unknown class", under(
        name("canary_module.X") + b")R" + put(1) + b"}" + text("self") + get(1) + b"sb"), CODE, HARMLESS),
    _bad("a device with a long name", under(call("torch.device", LONG_TEXT)),
         "it names a device by something that is not a name"),
    _bad("a size that is none", under(call("torch.Size", b"]" + text("x") + b"a")),
         "a size is not made of whole numbers"),
]  # fmt: skip

FOUR = (b"\0" * 4,)
HUGE = sizes(1 << 40)
EXPANDED = tensor(size=HUGE, stride=sizes(0))
VIEW = {kind: b"}" + text(kind) + b"\x88s" for kind in ("neg", "conj")}
DOUBLES = "torch.ComplexDoubleStorage"


def _quantised(size: bytes, stride: bytes, quantizer: bytes) -> bytes:
    return call("torch._utils._rebuild_qtensor", storage(kind="torch.QInt8Storage"), b"K\0", size, stride, quantizer,
                b"\x89", call("collections.OrderedDict"))  # fmt: skip


def _channels(scales: bytes, zeros: bytes) -> bytes:
    return tuple_of(name("torch.per_channel_affine"), scales, zeros, b"K\0")


def _sparse(indices: bytes, values: bytes, size: bytes = HUGE) -> bytes:
    layout = call("torch.serialization._get_layout", text("torch.sparse_coo"))
    return call("torch._utils._rebuild_sparse_tensor", layout, tuple_of(indices, values, size))


LONGS = tensor(size=sizes(1, 1), stride=sizes(1, 1), kind="torch.LongStorage", key="1")
TENSORS = [
    Program("as large as 4 TiB, on 4 bytes", under(EXPANDED), HARMLESS, HARMLESS, FOUR),
    Program("such a one, negated", under(tensor(size=HUGE, stride=sizes(0), rest=VIEW["neg"])), HARMLESS, HARMLESS,
            FOUR),
    Program("such a one, conjugated", under(tensor(size=HUGE, stride=sizes(0), rest=VIEW["conj"], kind=DOUBLES)),
            HARMLESS, HARMLESS, (b"\0" * 16,)),
    _bad("one of many elements negated again and again", under(b"](" + tensor(
        size=sizes(250_000), numel=250_000, rest=VIEW["neg"]) * 1000 + b"e"), COPIES, storages=(b"\0" * 1_000_000,)),
    _bad("beyond its record", under(tensor(size=sizes(2))), "a tensor of shape (2,) reaches beyond its record",
         storages=FOUR),
    _bad("beyond its record by its offset", under(tensor(offset=b"K\1")),
         "a tensor of shape (1,) reaches beyond its record", storages=FOUR),
    _bad("before its record", under(tensor(offset=number(-1))), "a tensor of shape (1,) reaches beyond its record",
         storages=FOUR),
    _bad("a negative size", under(tensor(size=sizes(-1))), NO_SIZE, storages=FOUR),
    _bad("a negative stride", under(tensor(stride=sizes(-1))), NO_SIZE, storages=FOUR),
    _bad("a size that is text", under(tensor(size=text("x") + b"\x85")), NO_SIZE, storages=FOUR),
    _bad("a size that is a float", under(tensor(size=b"G\x3f\xf0\0\0\0\0\0\0\x85")), NO_SIZE, storages=FOUR),
    _bad("a size that is a tensor", under(tensor(size=tensor() + b"\x85")), NO_SIZE, storages=FOUR),
    _bad("more sizes than strides", under(tensor(size=sizes(1, 1))),
         "zip() argument 2 is shorter than argument 1", "ValueError('zip() argument 2 is shorter than argument 1')",
         storages=FOUR),
    _bad("more elements than 64 bits count", under(tensor(size=sizes(1 << 40, 1 << 40), stride=sizes(0, 0))),
         f"a tensor of shape {(1 << 40, 1 << 40)} has more elements than can be counted", storages=FOUR),
    _bad("10,000 dimensions", under(tensor(size=sizes(*[1] * 10_000), stride=sizes(*[1] * 10_000))),
         "a tensor has an offset or a number of dimensions that none has", storages=FOUR),
    _bad("metadata that is none", under(tensor(rest=text("conj"))), "a str says nothing of a tensor", storages=FOUR),
    _bad("a record that is not there", under(tensor(key="7")), "there is no record data/7",
         "it has no record data/7"),
    _bad("a record by a path", under(tensor(key="../../etc/passwd")), "there is no record data/../../etc/passwd",
         "it has no record data/../../etc/passwd"),
    _bad("a storage longer than its record", under(tensor(numel=1000)),
         "data/0 has 4 bytes, which are not 1000 elements of torch.float32", storages=FOUR),
    _bad("a storage of a negative length", under(tensor(numel=-1)),
         "data/0 has 4 bytes, which are not -1 elements of torch.float32", storages=FOUR),
    _bad("a tensor on a tensor", under(call("torch._utils._rebuild_tensor_v2", tensor(), b"K\0", sizes(1), sizes(1),
         b"\x89", b"}")), "a NoneType is not a dtype", storages=FOUR),
    _bad("a dtype that is none", under(call("torch._utils._rebuild_tensor_v3", storage(), b"K\0", sizes(1), sizes(1),
         b"\x89", b"}", text("float32"))), "a str is not a dtype", storages=FOUR),
    _bad("a gradient for whole numbers", under(call("torch._utils._rebuild_tensor_v2", storage(kind="torch.IntStorage"),
         b"K\0", sizes(1), sizes(1), b"\x88", b"}")),
         "only Tensors of floating point dtype can require gradients",
         "RuntimeError('only Tensors of floating point dtype can require gradients')", storages=FOUR),
    _bad("quantised, of 1 TiB", under(_quantised(HUGE, sizes(0), _channels(tensor(), tensor()))),
         "a quantised tensor repeats its elements", storages=FOUR),
    _bad("quantised by 2 to the 80 lists", under(LISTS + put(7) + b"0" + _quantised(
         sizes(1), sizes(1), _channels(get(7), get(7)))),
         "a quantised tensor has scales that are not numbers", storages=FOUR),
    _bad("sparse, of 1 Ti indices", under(_sparse(tensor(size=sizes(1, 1 << 40), stride=sizes(1, 0),
         kind="torch.LongStorage", key="1"), EXPANDED)), "a tensor is made of one that repeats its elements",
         storages=(b"\0" * 4, b"\0" * 8)),
    _bad("sparse, with an index outside", under(_sparse(LONGS, tensor(), sizes(0))),
         "size is inconsistent with indices: for dim 0, size is 0 but found index 0",
         "RuntimeError('size is inconsistent with indices: for dim 0, size is 0 but found index 0')",
         storages=(b"\0" * 4, b"\0" * 8)),
    _bad("sparse, of lists", under(_sparse(b"]", b"]")), "a tensor is made of something that is not a plain tensor"),
    _bad("sparse, of a layout that is none", under(call("torch.serialization._get_layout", text("torch.jagged"))),
         "it names a layout that no checkpoint has"),
    Program("a tensor without memory, of 1 EiB", under(call("torch._utils._rebuild_meta_tensor_no_storage",
            name("torch.uint8"), HUGE, sizes(1), b"\x89")), HARMLESS, HARMLESS),
    _bad("one rebuilt by itself", under(b"]" + put(5) + b"0" + name("torch._tensor._rebuild_from_type_v2") + put(6)
         + tuple_of(get(6), b"N", get(5), b"N") + b"R"),
         "a tensor is put together by something that does not make tensors"),
    Program("20,000 names for a tensor of nothing", under(b"](" + tensor(size=sizes(0), numel=0) + put(3) + get(3) * 20_000
            + b"e"), HARMLESS, HARMLESS, (b"",)),
]  # fmt: skip

PROGRAMS = CODE_IN_EVERY_POSITION + CHANGES + BOMBS + TENSORS
assert len({program.what for program in PROGRAMS}) == len(PROGRAMS)
assert pickle.loads(under(text("x"))) == {"a": "x"}
