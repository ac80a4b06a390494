//! Reading Python pickles (protocols 0 to 5) without running anything: what a pickle would call becomes a
//! description of that call, and a global that the caller did not allow is an error. Serves the verification
//! sets (`.bin`) and PyTorch's state_dicts.
//!
//! It must not know what any global means, and never opens a file. Values live in one arena and name each other
//! by index, so neither depth nor cycles cost stack: not in reading, not in dropping. Bytes and texts borrow from
//! the input. Memory is bounded by the size of the input (about 100 bytes a byte at worst) and by [`Limits`].

mod read;

use std::borrow::Cow;

/// What a pickle may cost. The defaults hold a verification set of 100,000 pairs and any state_dict.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Values created; a value takes at most 40 bytes besides its entries (4 bytes each).
    pub values: usize,
    /// Values on the stack at once.
    pub stack: usize,
    /// Values remembered for later use.
    pub memo: usize,
    /// Bytes of one byte or text value.
    pub string: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            values: 1 << 22,
            stack: 1 << 20,
            memo: 1 << 21,
            string: 64 << 20,
        }
    }
}

/// A global that a pickle may name: (module, name).
pub type Allowed = (&'static str, &'static str);

/// How Python 3 writes bytes for protocols below 3: `_codecs.encode(text, "latin1")`. [`Value::bytes`] reads it.
pub const CODECS_ENCODE: Allowed = ("_codecs", "encode");
/// Python's own types of bytes, under the names of Python 3 and of Python 2, which Python 3 writes for protocols below 3. A call of
/// one is a constant: no bytes, or those of a text. [`Value::bytes`] reads it.
pub const BYTE_TYPES: [Allowed; 4] = [
    ("builtins", "bytes"),
    ("__builtin__", "bytes"),
    ("builtins", "bytearray"),
    ("__builtin__", "bytearray"),
];

/// Why a pickle is refused. Offsets are bytes from the start of the input to the operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PickleError {
    /// The input ends before the pickle does.
    #[error("pickle is cut off at byte {offset}: {wanted} more bytes wanted, {left} left")]
    Truncated {
        /// Offset.
        offset: usize,
        /// Bytes that the operation announces.
        wanted: u64,
        /// Bytes that are left.
        left: usize,
    },
    /// The pickle would load code or a type that this kind of file has no need for.
    #[error("pickle names the foreign global {module}.{name} at byte {offset}; nothing of it was run")]
    ForeignGlobal {
        /// Offset.
        offset: usize,
        /// Module, shortened and escaped.
        module: String,
        /// Name in it, shortened and escaped.
        name: String,
    },
    /// An operation that is unknown or not allowed.
    #[error("pickle uses operation {opcode:#04x} at byte {offset}, which is not allowed")]
    Opcode {
        /// Offset.
        offset: usize,
        /// The operation's byte.
        opcode: u8,
    },
    /// Not a pickle, or a damaged one.
    #[error("pickle is damaged at byte {offset}: {detail}")]
    Damaged {
        /// Offset.
        offset: usize,
        /// What does not fit.
        detail: &'static str,
    },
    /// Larger than any honest file of this kind.
    #[error("pickle has more than {limit} {what} at byte {offset}")]
    Limit {
        /// Offset.
        offset: usize,
        /// What there is too much of.
        what: &'static str,
        /// How much is accepted.
        limit: usize,
    },
}

/// Index of a value in its pickle's arena. Two values with the same id are the same Python object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ValueId(u32);

/// A pickle that was read: a graph of values.
#[derive(Debug)]
pub struct Pickle<'a> {
    nodes: Vec<Node<'a>>,
    root: ValueId,
    consumed: usize,
}

/// What the arena holds.
#[derive(Debug)]
enum Node<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Bytes(Cow<'a, [u8]>),
    Str(Cow<'a, str>),
    List(Vec<ValueId>),
    Tuple(Vec<ValueId>),
    /// Keys and values in turn, in the order of insertion; a key that was set twice stands twice.
    Dict(Vec<ValueId>),
    Global(&'a str, &'a str),
    Object(Box<ObjectNode>),
    Persistent(ValueId),
}

#[derive(Debug)]
struct ObjectNode {
    callable: ValueId,
    args: ValueId,
    appended: Vec<ValueId>,
    items: Vec<ValueId>,
    state: Option<ValueId>,
}

/// Reads one pickle from the start of `input`. Globals outside `allowed` are errors, wherever they stand.
pub fn read<'a>(input: &'a [u8], allowed: &[Allowed], limits: &Limits) -> Result<Pickle<'a>, PickleError> {
    read::Reader::new(input, allowed, limits).run()
}

impl<'a> Pickle<'a> {
    /// The value that was pickled.
    pub fn root(&self) -> Value<'_> {
        Value {
            nodes: &self.nodes,
            id: self.root,
        }
    }

    /// Every value that was made, in the order of the input, whether it is part of the root or not.
    pub fn values(&self) -> impl ExactSizeIterator<Item = Value<'_>> {
        let nodes = &self.nodes[..];
        (0..nodes.len()).map(move |index| Value {
            nodes,
            id: ValueId(index as u32),
        })
    }

    /// Bytes of the input up to and including the pickle's end; Python ignores what follows.
    pub fn consumed(&self) -> usize {
        self.consumed
    }
}

/// One value of a pickle; copied freely.
#[derive(Clone, Copy)]
pub struct Value<'p> {
    nodes: &'p [Node<'p>],
    id: ValueId,
}

/// What a value is.
#[derive(Clone, Copy)]
pub enum View<'p> {
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer of at most 64 bits.
    Int(i64),
    /// A float.
    Float(f64),
    /// Bytes, a bytearray or a Python 2 `str`.
    Bytes(&'p [u8]),
    /// A text.
    Str(&'p str),
    /// A list.
    List(Values<'p>),
    /// A tuple.
    Tuple(Values<'p>),
    /// A dict; see [`Values::pairs`].
    Dict(Values<'p>),
    /// An allowed global that is not called.
    Global(&'p str, &'p str),
    /// A call that Python would make.
    Object(Object<'p>),
    /// An object outside the pickle: the value that names it.
    Persistent(Value<'p>),
}

/// `module.name(*args)`, then what was appended, set as items, and given as state.
#[derive(Clone, Copy)]
pub struct Object<'p> {
    /// Module of the callable.
    pub module: &'p str,
    /// Name of the callable.
    pub name: &'p str,
    /// Arguments.
    pub args: Values<'p>,
    /// Entries appended to it (a subclass of list).
    pub appended: Values<'p>,
    /// Keys and values set on it (an `OrderedDict`); see [`Values::pairs`].
    pub items: Values<'p>,
    /// Argument of `__setstate__`, if any.
    pub state: Option<Value<'p>>,
}

/// A sequence of values.
#[derive(Clone, Copy)]
pub struct Values<'p> {
    nodes: &'p [Node<'p>],
    ids: &'p [ValueId],
}

impl<'p> Values<'p> {
    /// Number of values.
    pub fn len(self) -> usize {
        self.ids.len()
    }

    /// True if there is none.
    pub fn is_empty(self) -> bool {
        self.ids.is_empty()
    }

    /// The value at `index`.
    pub fn get(self, index: usize) -> Option<Value<'p>> {
        let id = *self.ids.get(index)?;
        Some(Value {
            nodes: self.nodes,
            id,
        })
    }

    /// All values.
    pub fn iter(self) -> impl ExactSizeIterator<Item = Value<'p>> {
        let nodes = self.nodes;
        self.ids.iter().map(move |&id| Value { nodes, id })
    }

    /// Keys and values of a dict or of an object's items, as they were set: of equal keys the last one counts.
    pub fn pairs(self) -> impl ExactSizeIterator<Item = (Value<'p>, Value<'p>)> {
        let nodes = self.nodes;
        self.ids
            .chunks_exact(2)
            .map(move |pair| (Value { nodes, id: pair[0] }, Value { nodes, id: pair[1] }))
    }

    /// Exactly `N` values, or nothing.
    pub fn exactly<const N: usize>(self) -> Option<[Value<'p>; N]> {
        let ids: [ValueId; N] = self.ids.try_into().ok()?;
        Some(ids.map(|id| Value {
            nodes: self.nodes,
            id,
        }))
    }
}

impl<'p> Value<'p> {
    /// Identity of the object.
    pub fn id(self) -> ValueId {
        self.id
    }

    /// What it is.
    pub fn view(self) -> View<'p> {
        let nodes = self.nodes;
        let values = |ids: &'p [ValueId]| Values { nodes, ids };
        match &nodes[self.id.0 as usize] {
            Node::None => View::None,
            Node::Bool(value) => View::Bool(*value),
            Node::Int(value) => View::Int(*value),
            Node::Float(value) => View::Float(*value),
            Node::Bytes(bytes) => View::Bytes(bytes),
            Node::Str(text) => View::Str(text),
            Node::List(ids) => View::List(values(ids)),
            Node::Tuple(ids) => View::Tuple(values(ids)),
            Node::Dict(ids) => View::Dict(values(ids)),
            Node::Global(module, name) => View::Global(module, name),
            Node::Persistent(id) => View::Persistent(Value { nodes, id: *id }),
            Node::Object(object) => {
                let (module, name) = match &nodes[object.callable.0 as usize] {
                    Node::Global(module, name) => (*module, *name),
                    _ => unreachable!("the reader makes objects of globals alone"),
                };
                let args: &[ValueId] = match &nodes[object.args.0 as usize] {
                    Node::Tuple(ids) => ids,
                    _ => unreachable!("the reader takes arguments from tuples alone"),
                };
                View::Object(Object {
                    module,
                    name,
                    args: values(args),
                    appended: values(&object.appended),
                    items: values(&object.items),
                    state: object.state.map(|id| Value { nodes, id }),
                })
            }
        }
    }

    /// Bytes, however Python wrote them: bytes, a Python 2 `str`, `_codecs.encode(text, "latin1")`, or, where the caller allows
    /// them, calls of [`BYTE_TYPES`]: `bytes()`, `bytearray()`, `bytearray(bytes)`, `bytearray(text, "latin-1")`.
    pub fn bytes(self) -> Option<Cow<'p, [u8]>> {
        let object = match self.view() {
            View::Bytes(bytes) => return Some(Cow::Borrowed(bytes)),
            View::Object(object) => object,
            _ => return None,
        };
        let callable = (object.module, object.name);
        let is_type = BYTE_TYPES.contains(&callable);
        match object.args.len() {
            0 if is_type => Some(Cow::Borrowed(&[])),
            // No deeper: what Python writes is at hand here.
            1 if is_type && object.name == "bytearray" => match object.args.get(0)?.view() {
                View::Bytes(bytes) => Some(Cow::Borrowed(bytes)),
                _ => None,
            },
            2 if callable == CODECS_ENCODE || is_type => {
                let [text, codec] = object.args.exactly()?;
                let (View::Str(text), View::Str("latin1" | "latin-1")) = (text.view(), codec.view()) else {
                    return None;
                };
                let bytes: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(c).ok()).collect();
                bytes.map(Cow::Owned)
            }
            _ => None,
        }
    }

    /// A text, or the bytes of a Python 2 `str` if they are UTF-8.
    pub fn text(self) -> Option<&'p str> {
        match self.view() {
            View::Str(text) => Some(text),
            View::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// An integer.
    pub fn int(self) -> Option<i64> {
        match self.view() {
            View::Int(value) => Some(value),
            _ => None,
        }
    }

    /// The kind of value, for messages.
    pub fn kind(self) -> &'static str {
        match self.view() {
            View::None => "None",
            View::Bool(_) => "a bool",
            View::Int(_) => "an integer",
            View::Float(_) => "a float",
            View::Bytes(_) => "bytes",
            View::Str(_) => "a text",
            View::List(_) => "a list",
            View::Tuple(_) => "a tuple",
            View::Dict(_) => "a dict",
            View::Global(..) => "a global",
            View::Object(_) => "an object",
            View::Persistent(_) => "a persistent object",
        }
    }
}

#[cfg(test)]
mod tests;
