//! The pickle machine: one loop over the operations of protocols 0 to 5 that only moves values about. It knows
//! nothing of what the values are for.
//!
//! Left out on purpose, and refused: classes (INST, OBJ, NEWOBJ, NEWOBJ_EX), extension codes, text persistent
//! ids, sets and out-of-band buffers: no file of ours has them.

use super::{Allowed, Limits, Node, ObjectNode, Pickle, PickleError, ValueId};
use std::{borrow::Cow, collections::HashMap, mem};

const NONE: ValueId = ValueId(0);
const FALSE: ValueId = ValueId(1);
const TRUE: ValueId = ValueId(2);
const NEWEST_PROTOCOL: u8 = 5;

pub(super) struct Reader<'a, 'l> {
    input: &'a [u8],
    /// Next byte to read.
    at: usize,
    /// Where the current operation began.
    offset: usize,
    allowed: &'l [Allowed],
    limits: &'l Limits,
    nodes: Vec<Node<'a>>,
    stack: Vec<ValueId>,
    /// Heights of the stack at the open marks.
    marks: Vec<usize>,
    memo: HashMap<u32, ValueId>,
}

type Step<T> = Result<T, PickleError>;

impl<'a, 'l> Reader<'a, 'l> {
    pub(super) fn new(input: &'a [u8], allowed: &'l [Allowed], limits: &'l Limits) -> Self {
        Self {
            input,
            at: 0,
            offset: 0,
            allowed,
            limits,
            // In the order of the constants above.
            nodes: vec![Node::None, Node::Bool(false), Node::Bool(true)],
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        }
    }

    pub(super) fn run(mut self) -> Step<Pickle<'a>> {
        loop {
            self.offset = self.at;
            let [opcode] = self.array()?;
            match opcode {
                b'.' => {
                    let root = self.pop()?;
                    return Ok(Pickle {
                        nodes: self.nodes,
                        root,
                        consumed: self.at,
                    });
                }
                0x80 => {
                    let [protocol] = self.array()?;
                    if protocol > NEWEST_PROTOCOL {
                        return Err(self.damaged("its protocol is newer than 5"));
                    }
                }
                // FRAME: only says how far a reader may read ahead.
                0x95 => {
                    self.array::<8>()?;
                }
                b'(' => {
                    self.check("open marks", self.marks.len(), self.limits.stack)?;
                    self.marks.push(self.stack.len());
                }
                b'0' => {
                    // POP takes a mark, if one is on top.
                    if self.marks.last() == Some(&self.stack.len()) {
                        self.marks.pop();
                    } else {
                        self.pop()?;
                    }
                }
                b'1' => drop(self.pop_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.push(top)?;
                }
                b'N' => self.push(NONE)?,
                0x88 => self.push(TRUE)?,
                0x89 => self.push(FALSE)?,
                b'I' | b'L' | b'J' | b'K' | b'M' | 0x8a | 0x8b | b'F' | b'G' => self.number(opcode)?,
                b'S' | b'T' | b'U' | b'B' | b'C' | 0x8e | 0x96 | b'V' | b'X' | 0x8c | 0x8d => {
                    self.string(opcode)?
                }
                b']' | b')' | b'}' | b'l' | b't' | b'd' | 0x85..=0x87 | b'a' | b'e' | b's' | b'u' => {
                    self.container(opcode)?
                }
                b'p' | b'q' | b'r' | 0x94 | b'g' | b'h' | b'j' => self.memory(opcode)?,
                b'c' | 0x93 => self.global(opcode)?,
                b'R' => self.reduce()?,
                b'b' => self.build()?,
                b'Q' => {
                    let id = self.pop()?;
                    self.create(Node::Persistent(id))?;
                }
                opcode => {
                    return Err(PickleError::Opcode {
                        offset: self.offset,
                        opcode,
                    });
                }
            }
        }
    }

    fn number(&mut self, opcode: u8) -> Step<()> {
        let node = match opcode {
            b'I' => match self.line()? {
                // How protocols 0 and 1 write booleans.
                "00" => return self.push(FALSE),
                "01" => return self.push(TRUE),
                text => Node::Int(self.parse(text)?),
            },
            b'L' => {
                let text = self.line()?;
                Node::Int(self.parse(text.strip_suffix('L').unwrap_or(text))?)
            }
            b'J' => Node::Int(i32::from_le_bytes(self.array()?).into()),
            b'K' => Node::Int(u8::from_le_bytes(self.array()?).into()),
            b'M' => Node::Int(u16::from_le_bytes(self.array()?).into()),
            0x8a => {
                let [len] = self.array()?;
                self.long(len.into())?
            }
            0x8b => {
                let len = u32::from_le_bytes(self.array()?);
                self.long(len.into())?
            }
            b'F' => {
                let text = self.line()?;
                Node::Float(self.parse(text)?)
            }
            _ => Node::Float(f64::from_be_bytes(self.array()?)),
        };
        self.create(node)
    }

    /// Little-endian two's complement of `len` bytes.
    fn long(&mut self, len: u64) -> Step<Node<'a>> {
        let bytes = self.take(len)?;
        if bytes.len() > 8 {
            return Err(self.damaged("an integer has more than 64 bits"));
        }
        let negative = bytes.last().is_some_and(|top| top & 0x80 != 0);
        let mut word = [if negative { 0xff } else { 0 }; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        Ok(Node::Int(i64::from_le_bytes(word)))
    }

    fn string(&mut self, opcode: u8) -> Step<()> {
        let len: u64 = match opcode {
            b'S' => {
                let line = self.line()?;
                let bytes = self.unescape(line)?;
                return self.create(Node::Bytes(Cow::Owned(bytes)));
            }
            b'V' => {
                let line = self.bytes_of_line()?;
                let text = self.unescape_unicode(line)?;
                return self.create(Node::Str(Cow::Owned(text)));
            }
            b'U' | b'C' | 0x8c => {
                let [len] = self.array()?;
                len.into()
            }
            b'T' | b'B' | b'X' => u32::from_le_bytes(self.array()?).into(),
            _ => u64::from_le_bytes(self.array()?),
        };
        let bytes = self.take(len)?;
        self.check(
            "bytes in one string",
            bytes.len().saturating_sub(1),
            self.limits.string,
        )?;
        match opcode {
            b'X' | 0x8c | 0x8d => {
                let text = std::str::from_utf8(bytes).map_err(|_| self.damaged("a text is not UTF-8"))?;
                self.create(Node::Str(Cow::Borrowed(text)))
            }
            _ => self.create(Node::Bytes(Cow::Borrowed(bytes))),
        }
    }

    fn container(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            b']' => self.create(Node::List(Vec::new())),
            b')' => self.create(Node::Tuple(Vec::new())),
            b'}' => self.create(Node::Dict(Vec::new())),
            b'l' => {
                let entries = self.pop_mark()?;
                self.create(Node::List(entries))
            }
            b't' => {
                let entries = self.pop_mark()?;
                self.create(Node::Tuple(entries))
            }
            b'd' => {
                let entries = self.pop_mark()?;
                self.pairs_only(&entries)?;
                self.create(Node::Dict(entries))
            }
            0x85..=0x87 => {
                let entries = self.pop_many((opcode - 0x84).into())?;
                self.create(Node::Tuple(entries))
            }
            b'a' => {
                let entries = self.pop_many(1)?;
                self.append(entries)
            }
            b'e' => {
                let entries = self.pop_mark()?;
                self.append(entries)
            }
            b's' => {
                let entries = self.pop_many(2)?;
                self.set_items(entries)
            }
            _ => {
                let entries = self.pop_mark()?;
                self.set_items(entries)
            }
        }
    }

    fn append(&mut self, entries: Vec<ValueId>) -> Step<()> {
        let target = self.top()?;
        match &mut self.nodes[target.0 as usize] {
            Node::List(list) => list.extend(entries),
            Node::Object(object) => object.appended.extend(entries),
            _ => return Err(self.damaged("something is appended to what is no list")),
        }
        Ok(())
    }

    fn set_items(&mut self, entries: Vec<ValueId>) -> Step<()> {
        self.pairs_only(&entries)?;
        let target = self.top()?;
        match &mut self.nodes[target.0 as usize] {
            Node::Dict(dict) => dict.extend(entries),
            Node::Object(object) => object.items.extend(entries),
            _ => return Err(self.damaged("a key is set on what is no dict")),
        }
        Ok(())
    }

    fn pairs_only(&self, entries: &[ValueId]) -> Step<()> {
        match entries.len() % 2 {
            0 => Ok(()),
            _ => Err(self.damaged("a key has no value")),
        }
    }

    fn memory(&mut self, opcode: u8) -> Step<()> {
        let index = match opcode {
            b'p' | b'g' => {
                let text = self.line()?;
                self.parse(text)?
            }
            b'q' | b'h' => u8::from_le_bytes(self.array()?).into(),
            b'r' | b'j' => u32::from_le_bytes(self.array()?),
            // MEMOIZE; the memo's limit is below 2^32.
            _ => self.memo.len() as u32,
        };
        if matches!(opcode, b'g' | b'h' | b'j') {
            let id = *self
                .memo
                .get(&index)
                .ok_or_else(|| self.damaged("a value is used that was not remembered"))?;
            return self.push(id);
        }
        self.check("remembered values", self.memo.len(), self.limits.memo)?;
        let top = self.top()?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn global(&mut self, opcode: u8) -> Step<()> {
        let (module, name) = if opcode == b'c' {
            (self.line()?, self.line()?)
        } else {
            let names = self.pop_many(2)?;
            let text = |id: ValueId| match &self.nodes[id.0 as usize] {
                Node::Str(Cow::Borrowed(text)) => Some(*text),
                _ => None,
            };
            match (text(names[0]), text(names[1])) {
                (Some(module), Some(name)) => (module, name),
                _ => return Err(self.damaged("a global's name is no text")),
            }
        };
        if !self.allowed.contains(&(module, name)) {
            let short = |text: &str| {
                text.chars()
                    .take(64)
                    .collect::<String>()
                    .escape_debug()
                    .to_string()
            };
            return Err(PickleError::ForeignGlobal {
                offset: self.offset,
                module: short(module),
                name: short(name),
            });
        }
        self.create(Node::Global(module, name))
    }

    fn reduce(&mut self) -> Step<()> {
        let args = self.pop()?;
        let callable = self.pop()?;
        if !matches!(self.nodes[callable.0 as usize], Node::Global(..)) {
            return Err(self.damaged("what is called is no global"));
        }
        if !matches!(self.nodes[args.0 as usize], Node::Tuple(_)) {
            return Err(self.damaged("the arguments of a call are no tuple"));
        }
        self.create(Node::Object(Box::new(ObjectNode {
            callable,
            args,
            appended: Vec::new(),
            items: Vec::new(),
            state: None,
        })))
    }

    fn build(&mut self) -> Step<()> {
        let state = self.pop()?;
        let target = self.top()?;
        match &mut self.nodes[target.0 as usize] {
            Node::Object(object) => object.state = Some(state),
            _ => return Err(self.damaged("a state is given to what is no object")),
        }
        Ok(())
    }

    // The stack.

    fn create(&mut self, node: Node<'a>) -> Step<()> {
        self.check(
            "values",
            self.nodes.len(),
            self.limits.values.min(u32::MAX as usize),
        )?;
        let id = ValueId(self.nodes.len() as u32);
        self.nodes.push(node);
        self.push(id)
    }

    fn push(&mut self, id: ValueId) -> Step<()> {
        self.check("values on the stack", self.stack.len(), self.limits.stack)?;
        self.stack.push(id);
        Ok(())
    }

    /// Values above the newest mark: an operation must not reach below it.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Step<ValueId> {
        self.stack[self.floor()..]
            .last()
            .copied()
            .ok_or_else(|| self.damaged("the stack is empty"))
    }

    fn pop(&mut self) -> Step<ValueId> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    fn pop_many(&mut self, count: usize) -> Step<Vec<ValueId>> {
        let rest = self.stack.len() - self.floor();
        match rest.checked_sub(count) {
            Some(_) => Ok(self.stack.split_off(self.stack.len() - count)),
            None => Err(self.damaged("the stack is empty")),
        }
    }

    fn pop_mark(&mut self) -> Step<Vec<ValueId>> {
        let floor = self
            .marks
            .pop()
            .ok_or_else(|| self.damaged("a mark is missing"))?;
        Ok(self.stack.drain(floor..).collect())
    }

    // The input.

    fn take(&mut self, len: u64) -> Step<&'a [u8]> {
        let left = &self.input[self.at..];
        let taken = usize::try_from(len).ok().and_then(|len| left.get(..len));
        let Some(taken) = taken else {
            return Err(PickleError::Truncated {
                offset: self.offset,
                wanted: len,
                left: left.len(),
            });
        };
        self.at += taken.len();
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N as u64)?;
        Ok(bytes.try_into().expect("take gives as many bytes as asked for"))
    }

    /// Text up to the next newline, which is consumed.
    fn line(&mut self) -> Step<&'a str> {
        let line = self.bytes_of_line()?;
        std::str::from_utf8(line).map_err(|_| self.damaged("a line is not UTF-8"))
    }

    /// The same, whatever its bytes are.
    fn bytes_of_line(&mut self) -> Step<&'a [u8]> {
        let left = &self.input[self.at..];
        let Some(len) = left.iter().position(|&b| b == b'\n') else {
            return Err(PickleError::Truncated {
                offset: self.offset,
                wanted: left.len() as u64 + 1,
                left: left.len(),
            });
        };
        self.at += len + 1;
        self.check("bytes in one string", len.saturating_sub(1), self.limits.string)?;
        Ok(&left[..len])
    }

    fn parse<T: std::str::FromStr>(&self, text: &str) -> Step<T> {
        text.trim()
            .parse()
            .map_err(|_| self.damaged("a number cannot be read or does not fit 64 bits"))
    }

    /// Python's `repr` of a byte string: quotes and backslash escapes.
    fn unescape(&self, line: &str) -> Step<Vec<u8>> {
        let damaged = || self.damaged("a quoted string cannot be read");
        let quote = line
            .chars()
            .next()
            .filter(|c| matches!(c, '\'' | '"'))
            .ok_or_else(damaged)?;
        let body = line[1..].strip_suffix(quote).ok_or_else(damaged)?;
        let mut out = Vec::with_capacity(body.len());
        let mut rest = body.as_bytes();
        while let Some((&byte, tail)) = rest.split_first() {
            rest = tail;
            if byte != b'\\' {
                out.push(byte);
                continue;
            }
            let (&kind, tail) = rest.split_first().ok_or_else(damaged)?;
            rest = tail;
            out.push(match kind {
                b'\\' | b'\'' | b'"' => kind,
                b'n' => b'\n',
                b'r' => b'\r',
                b't' => b'\t',
                b'x' => hex(&mut rest, 2)
                    .and_then(|v| u8::try_from(v).ok())
                    .ok_or_else(damaged)?,
                _ => return Err(damaged()),
            });
        }
        Ok(out)
    }

    /// Python's raw-unicode-escape: only `\uXXXX` and `\UXXXXXXXX` are escapes; other bytes are Latin-1.
    fn unescape_unicode(&self, line: &[u8]) -> Step<String> {
        let mut out = String::with_capacity(line.len());
        let mut rest = line;
        while let Some((&byte, tail)) = rest.split_first() {
            let digits = match (byte, tail.first()) {
                (b'\\', Some(b'u')) => 4,
                (b'\\', Some(b'U')) => 8,
                _ => {
                    out.push(char::from(byte));
                    rest = tail;
                    continue;
                }
            };
            rest = &tail[1..];
            let escaped = hex(&mut rest, digits).and_then(char::from_u32);
            out.push(escaped.ok_or_else(|| self.damaged("a unicode escape cannot be read"))?);
        }
        Ok(out)
    }

    fn check(&self, what: &'static str, count: usize, limit: usize) -> Step<()> {
        match count < limit {
            true => Ok(()),
            false => Err(PickleError::Limit {
                offset: self.offset,
                what,
                limit,
            }),
        }
    }

    fn damaged(&self, detail: &'static str) -> PickleError {
        PickleError::Damaged {
            offset: self.offset,
            detail,
        }
    }
}

/// Takes `digits` hexadecimal digits from the front of `rest`.
fn hex(rest: &mut &[u8], digits: usize) -> Option<u32> {
    let (front, tail) = mem::take(rest).split_at_checked(digits)?;
    *rest = tail;
    front.iter().try_fold(0u32, |value, &digit| {
        Some(value << 4 | char::from(digit).to_digit(16)?)
    })
}
