//! The stack machine: the opcodes of pickle protocols 2 to 5, as far as torch writes them.
//!
//! It only moves numbers of values between a stack, a memo and containers. Calling a name makes a value of
//! [`allowed::call`]'s kind, or is an error; no code is looked up, loaded or run.

use std::collections::HashMap;

use super::PickleError;
use super::allowed::{self, Call};
use super::value::{Id, Name, Storage, Tensor, Value};

/// Values that a pickle may make; Stable Diffusion XL makes 60 000.
const MAX_VALUES: usize = 1 << 20;
/// Values that may wait on the stack; Python moves a thousand at once.
const MAX_STACK: usize = 1 << 16;
/// Values that may be remembered.
const MAX_MEMO: usize = 1 << 20;
/// Bytes of a text or a byte string.
const MAX_TEXT_BYTES: usize = 4 << 20;

type Outcome<T> = Result<T, PickleError>;

/// Reads one pickle.
pub struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Lengths of the stack where groups begin.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
    /// Items that dictionaries took over from lists, which could be the same list again and again.
    copied: usize,
}

impl<'a> Machine<'a> {
    /// A machine at the first byte of a pickle.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            at: 0,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
            copied: 0,
        }
    }

    /// Bytes that were read; after [`Self::run`] the length of the pickle.
    pub fn position(&self) -> usize {
        self.at
    }

    /// The value of this number.
    pub fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id.0 as usize]
    }

    /// All values that were made.
    pub fn values(&self) -> impl Iterator<Item = &Value<'a>> {
        self.values.iter()
    }

    /// The text that a value is.
    pub fn text(&self, id: Id) -> Option<&'a str> {
        match self.value(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// What a dictionary has under a name.
    pub fn item(&self, dictionary: Id, name: &str) -> Option<Id> {
        let Value::Dict(items) = self.value(dictionary) else {
            return None;
        };
        // What was set last counts.
        let mut named = items.iter().rev();
        let found = named.find(|(key, _)| self.text(*key) == Some(name));
        found.map(|(_, item)| *item)
    }

    /// Reads to the end of the pickle; its value.
    ///
    /// # Errors
    /// When it is broken, exceeds a limit, or calls what must not be called.
    pub fn run(&mut self) -> Outcome<Id> {
        loop {
            let at = self.at;
            let opcode = self.byte()?;
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode, at)?;
        }
    }

    fn step(&mut self, opcode: u8, at: usize) -> Outcome<()> {
        match opcode {
            0x80 => self.protocol(),
            0x95 => self.take(8).map(drop), // a frame: the bytes after it are opcodes as before
            b'(' => self.mark(),
            b'0' => self.pop().map(drop),
            // Items of a set, which is not looked at, go as those of a group that nobody wants.
            b'1' | 0x90 => self.pop_group().map(drop),
            b'2' => {
                let top = self.top()?;
                self.push_id(top)
            }
            b'N' => self.push(Value::None),
            0x88 | 0x89 | 0x8f => self.push(Value::Inert),
            b'G' => {
                self.take(8)?;
                self.push(Value::Inert)
            }
            b'J' | b'K' | b'M' | 0x8a | 0x8b => self.integer(opcode),
            b'T' | b'U' | b'X' | b'B' | b'C' | 0x8c | 0x8d | 0x8e | 0x96 => self.string(opcode),
            b')' | b't' | 0x85..=0x87 => self.tuple(opcode),
            b']' => self.push(Value::List(Vec::new())),
            b'l' => {
                let items = self.pop_group()?;
                self.push(Value::List(items))
            }
            b'}' => self.push(Value::Dict(Vec::new())),
            b'd' => {
                let pairs = pairs(&self.pop_group()?)?;
                self.push(Value::Dict(pairs))
            }
            b'a' | b'e' => self.append(opcode),
            b's' | b'u' => self.set_items(opcode),
            0x91 => {
                self.pop_group()?;
                self.push(Value::Inert)
            }
            b'h' | b'j' | b'q' | b'r' | 0x94 => self.remember(opcode),
            b'c' | 0x93 => {
                let name = self.global(opcode)?;
                self.push(Value::Global(name))
            }
            b'Q' => self.persistent(),
            b'R' | 0x81 | 0x92 | b'i' | b'o' => self.call_opcode(opcode),
            b'b' => self.build(),
            other => Err(PickleError::Broken(format!(
                "its pickle has the opcode {other:#04x} at byte {at}, which torch does not write"
            ))),
        }
    }

    fn protocol(&mut self) -> Outcome<()> {
        match self.byte()? {
            2..=5 => Ok(()),
            other => Err(PickleError::Broken(format!(
                "its pickle has protocol {other}, expected 2 to 5"
            ))),
        }
    }

    fn integer(&mut self, opcode: u8) -> Outcome<()> {
        let value = match opcode {
            b'J' => i64::from(i32::from_le_bytes(self.array()?)),
            b'K' => i64::from(self.byte()?),
            b'M' => i64::from(u16::from_le_bytes(self.array()?)),
            _ => {
                let length = match opcode {
                    0x8a => usize::from(self.byte()?),
                    _ => self.length32()?,
                };
                let bytes = self.take(length)?;
                if length > 8 {
                    return self.push(Value::Inert); // nothing that is needed is that large
                }
                let negative = bytes.last().is_some_and(|last| last & 0x80 != 0);
                let mut word = [if negative { 0xff } else { 0 }; 8];
                word[..length].copy_from_slice(bytes);
                i64::from_le_bytes(word)
            }
        };
        self.push(Value::Int(value))
    }

    fn string(&mut self, opcode: u8) -> Outcome<()> {
        let length = match opcode {
            b'U' | b'C' | 0x8c => usize::from(self.byte()?),
            b'T' | b'X' | b'B' => self.length32()?,
            _ => {
                let length = u64::from_le_bytes(self.array()?);
                usize::try_from(length).unwrap_or(usize::MAX)
            }
        };
        if length > MAX_TEXT_BYTES {
            return Err(PickleError::Broken(format!(
                "its pickle has a text of {length} bytes, at most {MAX_TEXT_BYTES} are read"
            )));
        }
        let bytes = self.take(length)?;
        let is_text = matches!(opcode, b'T' | b'U' | b'X' | 0x8c | 0x8d);
        match std::str::from_utf8(bytes) {
            Ok(text) if is_text => self.push(Value::Text(text)),
            // Python 2 keeps bytes as texts; names are never such.
            _ => self.push(Value::Inert),
        }
    }

    fn tuple(&mut self, opcode: u8) -> Outcome<()> {
        let items = match opcode {
            b')' => Vec::new(),
            b't' => self.pop_group()?,
            _ => {
                let count = usize::from(opcode - 0x84);
                let mut items = Vec::with_capacity(count);
                for _ in 0..count {
                    items.push(self.pop()?);
                }
                items.reverse();
                items
            }
        };
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, opcode: u8) -> Outcome<()> {
        let items = match opcode {
            b'a' => vec![self.pop()?],
            _ => self.pop_group()?,
        };
        let list = self.top()?;
        match &mut self.values[list.0 as usize] {
            Value::List(into) => into.extend(items),
            Value::Inert => {}
            _ => return Err(PickleError::broken("its pickle appends to what is no list")),
        }
        Ok(())
    }

    fn set_items(&mut self, opcode: u8) -> Outcome<()> {
        let items = match opcode {
            b's' => {
                let item = self.pop()?;
                vec![(self.pop()?, item)]
            }
            _ => pairs(&self.pop_group()?)?,
        };
        let dictionary = self.top()?;
        match &mut self.values[dictionary.0 as usize] {
            Value::Dict(into) => into.extend(items),
            Value::Inert => {}
            _ => {
                return Err(PickleError::broken(
                    "its pickle sets items of what is no dictionary",
                ));
            }
        }
        Ok(())
    }

    fn remember(&mut self, opcode: u8) -> Outcome<()> {
        let number = match opcode {
            b'h' | b'q' => u32::from(self.byte()?),
            b'j' | b'r' => u32::from_le_bytes(self.array()?),
            // `MEMOIZE` counts.
            _ => u32::try_from(self.memo.len()).unwrap_or(u32::MAX),
        };
        if matches!(opcode, b'h' | b'j') {
            let found = self.memo.get(&number).copied();
            let missing = || format!("its pickle asks for value {number}, which was not kept");
            return self.push_id(found.ok_or_else(|| PickleError::Broken(missing()))?);
        }
        if self.memo.len() >= MAX_MEMO {
            return Err(too_many("values to remember", MAX_MEMO));
        }
        let top = self.top()?;
        self.memo.insert(number, top);
        Ok(())
    }

    /// A name: two lines, or two texts on the stack.
    fn global(&mut self, opcode: u8) -> Outcome<Name<'a>> {
        if opcode == b'c' || opcode == b'i' {
            let (module, name) = (self.line()?, self.line()?);
            return Ok(Name { module, name });
        }
        let (name, module) = (self.pop()?, self.pop()?);
        match (self.text(module), self.text(name)) {
            (Some(module), Some(name)) => Ok(Name { module, name }),
            _ => Err(PickleError::broken("its pickle has a name that is no text")),
        }
    }

    /// A storage, which lies elsewhere in the file: `('storage', class, key, device, elements)`.
    fn persistent(&mut self) -> Outcome<()> {
        let id = self.pop()?;
        let storage = self.storage_of(id).ok_or_else(|| {
            PickleError::broken("its pickle has a reference that is no storage of torch's")
        })?;
        self.push(storage)
    }

    fn storage_of(&self, id: Id) -> Option<Value<'a>> {
        let Value::Tuple(parts) = self.value(id) else {
            return None;
        };
        let [kind, class, key, _device, elements, ..] = parts.as_slice() else {
            return None;
        };
        if self.text(*kind)? != "storage" || parts.len() > 6 {
            return None;
        }
        let (Value::Global(class), Value::Int(elements)) =
            (self.value(*class), self.value(*elements))
        else {
            return None;
        };
        // Old torch could keep a part of a storage.
        let is_part = parts
            .get(5)
            .is_some_and(|part| !matches!(self.value(*part), Value::None));
        let known = allowed::storage(*class).filter(|_| !is_part);
        Some(match known {
            Some(dtype) => Value::Storage(Storage {
                key: self.text(*key)?,
                dtype,
                elements: u64::try_from(*elements).ok()?,
            }),
            // Of numbers that no model is made of.
            None if !is_part && class.module.starts_with("torch") => Value::Inert,
            None => return None,
        })
    }

    fn call_opcode(&mut self, opcode: u8) -> Outcome<()> {
        let (callee, arguments) = match opcode {
            // A class by its name, its arguments above the mark.
            b'i' => {
                let name = self.global(opcode)?;
                (Some(name), self.pop_group()?)
            }
            // The same with the class as the first above the mark.
            b'o' => {
                let group = self.pop_group()?;
                let (class, rest) = group.split_first().ok_or_else(underflow)?;
                (self.name(*class), rest.to_vec())
            }
            _ => {
                if opcode == 0x92 {
                    self.pop()?; // arguments by name
                }
                let arguments = self.pop()?;
                let callee = self.pop()?;
                let Value::Tuple(arguments) = self.value(arguments) else {
                    return Err(PickleError::broken(
                        "its pickle calls something with what is no tuple",
                    ));
                };
                (self.name(callee), arguments.clone())
            }
        };
        let callee =
            callee.ok_or_else(|| PickleError::broken("its pickle calls what is no name"))?;
        let made = self.call(callee, &arguments)?;
        match made {
            Made::New(value) => self.push(value),
            Made::Known(id) => self.push_id(id),
        }
    }

    fn name(&self, id: Id) -> Option<Name<'a>> {
        match self.value(id) {
            Value::Global(name) => Some(*name),
            _ => None,
        }
    }

    fn call(&mut self, name: Name<'a>, arguments: &[Id]) -> Outcome<Made<'a>> {
        let forbidden = || PickleError::Forbidden(name.to_string());
        let wrong =
            || PickleError::Broken(format!("its pickle calls `{name}` with wrong arguments"));
        match allowed::call(name).ok_or_else(forbidden)? {
            Call::Inert => Ok(Made::New(Value::Inert)),
            Call::Dict => {
                let items = self.dictionary(arguments).ok_or_else(wrong)?;
                self.copied += items.len();
                if self.copied > MAX_VALUES {
                    return Err(too_many("items of lists in dictionaries", MAX_VALUES));
                }
                Ok(Made::New(Value::Dict(items)))
            }
            Call::Parameter => match arguments {
                [tensor, ..] => Ok(Made::Known(*tensor)),
                [] => Err(wrong()),
            },
            kind @ (Call::Tensor | Call::TensorOfBytes) => {
                let tensor = self.tensor(kind, arguments).ok_or_else(wrong)?;
                Ok(Made::New(tensor))
            }
            Call::Wrapped => {
                let [function, _type, inner, ..] = arguments else {
                    return Err(wrong());
                };
                let (Some(function), Value::Tuple(inner)) =
                    (self.name(*function), self.value(*inner))
                else {
                    return Err(wrong());
                };
                let inner = inner.clone();
                match allowed::call(function) {
                    Some(Call::Wrapped) => Err(wrong()), // not any deeper
                    Some(_) => self.call(function, &inner),
                    None => Err(PickleError::Forbidden(function.to_string())),
                }
            }
        }
    }

    /// `OrderedDict()` or `OrderedDict([(key, value), …])`.
    fn dictionary(&self, arguments: &[Id]) -> Option<Vec<(Id, Id)>> {
        let mut items = Vec::new();
        if let Some(pairs) = arguments.first() {
            let (Value::List(pairs) | Value::Tuple(pairs)) = self.value(*pairs) else {
                return None;
            };
            for pair in pairs {
                let (Value::List(pair) | Value::Tuple(pair)) = self.value(*pair) else {
                    return None;
                };
                let [key, item] = pair.as_slice() else {
                    return None;
                };
                items.push((*key, *item));
            }
        }
        Some(items)
    }

    fn tensor(&self, kind: Call, arguments: &[Id]) -> Option<Value<'a>> {
        let [storage, offset, shape, strides, rest @ ..] = arguments else {
            return None;
        };
        let storage = match self.value(*storage) {
            Value::Storage(storage) => *storage,
            Value::Inert => return Some(Value::Inert),
            _ => return None,
        };
        let dtype = match kind {
            Call::TensorOfBytes => {
                // requires_grad, backward_hooks, dtype
                let dtype = self.name(*rest.get(2)?)?;
                match allowed::dtype(dtype) {
                    Some(dtype) => dtype,
                    None => return Some(Value::Inert),
                }
            }
            _ => storage.dtype?,
        };
        let Value::Int(offset) = self.value(*offset) else {
            return None;
        };
        Some(Value::Tensor(Box::new(Tensor {
            storage,
            dtype,
            offset: u64::try_from(*offset).ok()?,
            shape: self.sizes(*shape)?,
            strides: self.sizes(*strides)?,
        })))
    }

    fn sizes(&self, id: Id) -> Option<Vec<u64>> {
        let (Value::Tuple(items) | Value::List(items)) = self.value(id) else {
            return None;
        };
        if items.len() > 64 {
            return None; // no rank is that high
        }
        let size = |id: &Id| match self.value(*id) {
            Value::Int(size) => u64::try_from(*size).ok(),
            _ => None,
        };
        items.iter().map(size).collect()
    }

    /// Gives an object its state. All objects here are plain data, whose state nobody asks for.
    fn build(&mut self) -> Outcome<()> {
        self.pop()?;
        let object = self.top()?;
        match self.value(object) {
            Value::Global(name) => Err(PickleError::Forbidden(name.to_string())),
            _ => Ok(()),
        }
    }

    // The stack.

    fn push(&mut self, value: Value<'a>) -> Outcome<()> {
        if self.values.len() >= MAX_VALUES {
            return Err(too_many("values", MAX_VALUES));
        }
        let id = Id(self.values.len() as u32);
        self.values.push(value);
        self.push_id(id)
    }

    fn push_id(&mut self, id: Id) -> Outcome<()> {
        if self.stack.len() >= MAX_STACK {
            return Err(too_many("values on its stack", MAX_STACK));
        }
        self.stack.push(id);
        Ok(())
    }

    /// Nothing below a mark is reached but by taking the group.
    fn above_mark(&self) -> bool {
        self.stack.len() > self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Outcome<Id> {
        if !self.above_mark() {
            return Err(underflow());
        }
        self.stack.pop().ok_or_else(underflow)
    }

    fn top(&self) -> Outcome<Id> {
        if !self.above_mark() {
            return Err(underflow());
        }
        self.stack.last().copied().ok_or_else(underflow)
    }

    fn mark(&mut self) -> Outcome<()> {
        if self.marks.len() >= MAX_STACK {
            return Err(too_many("marks", MAX_STACK));
        }
        self.marks.push(self.stack.len());
        Ok(())
    }

    fn pop_group(&mut self) -> Outcome<Vec<Id>> {
        let mark = self.marks.pop().ok_or_else(underflow)?;
        Ok(self.stack.split_off(mark))
    }

    // The bytes.

    fn take(&mut self, count: usize) -> Outcome<&'a [u8]> {
        let end = self.at.checked_add(count);
        let taken = end.and_then(|end| self.bytes.get(self.at..end));
        let Some(taken) = taken else {
            return Err(PickleError::broken("its pickle ends early (truncated?)"));
        };
        self.at += count;
        Ok(taken)
    }

    fn byte(&mut self) -> Outcome<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn array<const N: usize>(&mut self) -> Outcome<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    fn length32(&mut self) -> Outcome<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn line(&mut self) -> Outcome<&'a str> {
        let rest = &self.bytes[self.at..];
        let window = &rest[..rest.len().min(1024)];
        let Some(length) = window.iter().position(|byte| *byte == b'\n') else {
            return Err(PickleError::broken("its pickle has a name without an end"));
        };
        self.at += length + 1;
        std::str::from_utf8(&rest[..length])
            .map_err(|_| PickleError::broken("its pickle has a name that is not UTF-8"))
    }
}

enum Made<'a> {
    New(Value<'a>),
    Known(Id),
}

fn pairs(items: &[Id]) -> Outcome<Vec<(Id, Id)>> {
    if !items.len().is_multiple_of(2) {
        return Err(PickleError::broken("its pickle has a key without a value"));
    }
    Ok(items
        .chunks_exact(2)
        .map(|pair| (pair[0], pair[1]))
        .collect())
}

fn underflow() -> PickleError {
    PickleError::broken("its pickle takes a value from an empty stack")
}

fn too_many(what: &str, most: usize) -> PickleError {
    PickleError::Broken(format!("its pickle has more than {most} {what}"))
}
