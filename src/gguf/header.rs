//! What stands before a GGUF file's tensors. Nothing in it is believed: every length is held against the
//! bytes that are left, every product is checked, and there is a bound to how much is kept.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::Path;

use super::Blocks;
use crate::{Error, Result};

/// Values that all metadata together may have; the largest vocabularies have a few hundred thousand.
const MOST_VALUES: u64 = 1 << 24;
/// Arrays within arrays.
const MOST_NESTED: u32 = 4;
/// Bytes of a name.
const LONGEST_NAME: usize = 65_535;
/// The largest `general.alignment`.
const MOST_ALIGNMENT: u64 = 1 << 20;

/// A value of the metadata. Integers and floats are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// u8, u16, u32, u64
    Unsigned(u64),
    /// i8, i16, i32, i64
    Signed(i64),
    /// f32, f64
    Float(f64),
    /// bool
    Flag(bool),
    /// UTF-8
    Text(String),
    /// An array.
    List(List),
}

/// The elements of an array, all of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum List {
    /// u8, u16, u32, u64
    Unsigned(Vec<u64>),
    /// i8, i16, i32, i64
    Signed(Vec<i64>),
    /// f32, f64
    Floats(Vec<f64>),
    /// bool
    Flags(Vec<bool>),
    /// UTF-8
    Texts(Vec<String>),
    /// Arrays.
    Lists(Vec<List>),
}

/// A tensor's type, shape and place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// How elements are stored.
    pub blocks: Blocks,
    /// Extents, outermost first; the file has them the other way round.
    pub shape: Vec<u32>,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// Metadata and tensors by name.
#[derive(Clone, Debug, PartialEq)]
pub struct Header {
    /// What the file says of the model.
    pub metadata: BTreeMap<String, Value>,
    /// What tensors it has.
    pub tensors: BTreeMap<String, Info>,
    path: std::path::PathBuf,
}

impl Header {
    /// Reads and checks the header of a whole file; `path` names it in errors.
    ///
    /// # Errors
    /// [`Error::File`] for what is no GGUF of version 3, is cut off, contradicts itself, or has tensors of
    /// types that are not read.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Header> {
        let mut reader = Reader {
            bytes,
            at: 0,
            values: 0,
        };
        let (metadata, tensors) = reader
            .header()
            .map_err(|what| Error::file(path, format_args!("not a whole GGUF file: {what}")))?;
        Ok(Header {
            metadata,
            tensors,
            path: path.to_owned(),
        })
    }

    /// Something wrong with this file.
    pub fn error(&self, what: impl std::fmt::Display) -> Error {
        Error::file(&self.path, what)
    }

    /// The file, for messages about it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn wrong(&self, key: &str, value: &Value, wanted: &str) -> Error {
        let mut is = format!("{value:?}");
        if let Some((end, _)) = is.char_indices().nth(60) {
            is.truncate(end);
            is.push('…');
        }
        Error::file(&self.path, format_args!("{key} is {is}: {wanted}"))
    }

    /// A text; `None` where there is no such key.
    ///
    /// # Errors
    /// Here and below, [`Error::File`] for a value of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, other, "a text is wanted")),
        }
    }

    /// An integer from 0 to 2^32 - 1.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let number = match *value {
            Value::Unsigned(n) => u32::try_from(n).ok(),
            Value::Signed(n) => u32::try_from(n).ok(),
            _ => None,
        };
        match number {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, value, "an integer from 0 to 2^32 - 1 is wanted")),
        }
    }

    /// A finite number.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Float(x)) if (x as f32).is_finite() => Ok(Some(x as f32)),
            Some(other) => Err(self.wrong(key, other, "a finite float is wanted")),
        }
    }

    /// Yes or no.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Flag(flag)) => Ok(Some(flag)),
            Some(other) => Err(self.wrong(key, other, "a bool is wanted")),
        }
    }

    /// An array.
    pub fn list(&self, key: &str) -> Result<Option<&List>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::List(list)) => Ok(Some(list)),
            Some(other) => Err(self.wrong(key, other, "an array is wanted")),
        }
    }

    /// An array of texts.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::List(List::Texts(texts))) => Ok(Some(texts)),
            Some(other) => Err(self.wrong(key, other, "an array of texts is wanted")),
        }
    }
}

/// What went wrong; the path is put before it.
type Read<T> = std::result::Result<T, String>;

struct Reader<'b> {
    bytes: &'b [u8],
    at: usize,
    /// Values of metadata so far.
    values: u64,
}

impl Reader<'_> {
    fn header(&mut self) -> Read<(BTreeMap<String, Value>, BTreeMap<String, Info>)> {
        if self.take(4, "the magic number")? != b"GGUF" {
            return Err("it does not begin with the bytes GGUF".into());
        }
        match self.u32("the version")? {
            3 => {}
            0x0300_0000 => return Err("it is big-endian; little-endian files are read".into()),
            other => return Err(format!("version {other}; version 3 is read")),
        }
        let n_tensors = self.u64("the number of tensors")?;
        let n_metadata = self.u64("the number of metadata")?;
        // The shortest entry there can be: an empty name, a type and a byte; or a name, one extent, a type
        // and an offset.
        self.holds(n_metadata, 8 + 4 + 1, "metadata")?;
        self.holds(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")?;

        let mut metadata = BTreeMap::new();
        for _ in 0..n_metadata {
            let key = self.name("a key of the metadata")?;
            let value = self.u32("a value's type").and_then(|ty| self.value(ty));
            let value = value.map_err(|what| format!("{key}: {what}"))?;
            match metadata.entry(key) {
                Entry::Vacant(slot) => slot.insert(value),
                Entry::Occupied(slot) => return Err(format!("{} is there twice", slot.key())),
            };
        }
        let alignment = match metadata.get("general.alignment") {
            None => 32,
            Some(&Value::Unsigned(n)) if n.is_power_of_two() && n <= MOST_ALIGNMENT => n,
            Some(other) => {
                return Err(format!(
                    "general.alignment is {other:?}: a power of two up to {MOST_ALIGNMENT} is wanted"
                ));
            }
        };

        let mut infos = BTreeMap::new();
        for _ in 0..n_tensors {
            let name = self.name("a tensor's name")?;
            let info = self.info(alignment);
            let info = info.map_err(|what| format!("the tensor {name}: {what}"))?;
            match infos.entry(name) {
                Entry::Vacant(slot) => slot.insert(info),
                Entry::Occupied(slot) => return Err(format!("{} is there twice", slot.key())),
            };
        }
        let tensors = self.places(infos, alignment)?;
        Ok((metadata, tensors))
    }

    /// A tensor without its place: type, shape, offset behind the header, bytes.
    fn info(&mut self, alignment: u64) -> Read<(Blocks, Vec<u32>, u64, u64)> {
        let n_dims = self.u32("the number of its extents")?;
        if !(1..=4).contains(&n_dims) {
            return Err(format!("{n_dims} extents; it may have 1 to 4"));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let extent = self.u64("an extent")?;
            let whole = u32::try_from(extent).ok().filter(|&n| n > 0);
            let whole = whole.ok_or_else(|| format!("an extent of {extent}; 1 to 2^32 - 1"))?;
            shape.push(whole);
        }
        let blocks = Blocks::of(self.u32("its type")?)
            .map_err(|ty| format!("its type {ty} is not one of those that are read: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q4_K and Q6_K"))?;
        let offset = self.u64("its offset")?;
        if !offset.is_multiple_of(alignment) {
            return Err(format!(
                "its offset {offset} is no multiple of the alignment, {alignment}"
            ));
        }
        if !shape[0].is_multiple_of(blocks.elements() as u32) {
            let (k, n) = (shape[0], blocks.elements());
            return Err(format!("rows of {k} elements in {blocks:?} blocks of {n}"));
        }
        let elements = shape
            .iter()
            .try_fold(1u64, |n, &extent| n.checked_mul(extent as u64));
        let bytes = elements
            .and_then(|n| (n / blocks.elements() as u64).checked_mul(blocks.bytes() as u64));
        let bytes = bytes.ok_or_else(|| format!("the shape {shape:?} overflows"))?;
        shape.reverse();
        Ok((blocks, shape, offset, bytes))
    }

    /// Where tensors lie: behind the header, within the file, none over another.
    fn places(
        &self,
        infos: BTreeMap<String, (Blocks, Vec<u32>, u64, u64)>,
        alignment: u64,
    ) -> Read<BTreeMap<String, Info>> {
        let len = self.bytes.len() as u64;
        let data = (self.at as u64).next_multiple_of(alignment);
        let mut tensors = BTreeMap::new();
        for (name, (blocks, shape, offset, bytes)) in infos {
            let start = data.checked_add(offset);
            let end = start.and_then(|start| start.checked_add(bytes));
            let (Some(start), Some(end)) = (start, end.filter(|&end| end <= len)) else {
                return Err(format!(
                    "the tensor {name}: {bytes} bytes at {offset} behind the header reach past the file's end at {len}"
                ));
            };
            let range = start as usize..end as usize;
            tensors.insert(
                name,
                Info {
                    blocks,
                    shape,
                    range,
                },
            );
        }
        let mut order: Vec<(&String, &Info)> = tensors.iter().collect();
        order.sort_by_key(|(_, info)| info.range.start);
        for pair in order.windows(2) {
            if pair[0].1.range.end > pair[1].1.range.start {
                let (first, second) = (pair[0].0, pair[1].0);
                return Err(format!("the tensors {first} and {second} overlap"));
            }
        }
        Ok(tensors)
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// An error where `n` things of at least `least` bytes cannot be in what is left.
    fn holds(&self, n: u64, least: u64, what: &str) -> Read<()> {
        match n.checked_mul(least) {
            Some(bytes) if bytes <= self.left() as u64 => Ok(()),
            _ => Err(format!("{n} {what} in {} bytes", self.left())),
        }
    }

    fn take(&mut self, n: usize, what: &str) -> Read<&[u8]> {
        let left = self.left();
        if n > left {
            return Err(format!("{what} takes {n} bytes, {left} are left"));
        }
        self.at += n;
        Ok(&self.bytes[self.at - n..self.at])
    }

    fn array<const N: usize>(&mut self, what: &str) -> Read<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N, what)?);
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Read<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Read<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn text(&mut self, what: &str) -> Read<String> {
        let n = self.u64("a text's length")?;
        let n = usize::try_from(n).map_err(|_| format!("{what} takes {n} bytes"))?;
        let at = self.at;
        let text = std::str::from_utf8(self.take(n, what)?);
        text.map(str::to_string)
            .map_err(|e| format!("{what} at byte {at} is no UTF-8: {e}"))
    }

    fn name(&mut self, what: &str) -> Read<String> {
        let name = self.text(what)?;
        match name.len() {
            1..=LONGEST_NAME => Ok(name),
            n => Err(format!("{what} has {n} bytes; 1 to {LONGEST_NAME}")),
        }
    }

    fn flag(&mut self) -> Read<bool> {
        match self.array("a bool")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(format!("a bool is {other}")),
        }
    }

    fn unsigned(&mut self, ty: u32) -> Read<u64> {
        const WHAT: &str = "an integer";
        Ok(match ty {
            0 => u8::from_le_bytes(self.array(WHAT)?).into(),
            2 => u16::from_le_bytes(self.array(WHAT)?).into(),
            4 => u32::from_le_bytes(self.array(WHAT)?).into(),
            _ => u64::from_le_bytes(self.array(WHAT)?),
        })
    }

    fn signed(&mut self, ty: u32) -> Read<i64> {
        const WHAT: &str = "an integer";
        Ok(match ty {
            1 => i8::from_le_bytes(self.array(WHAT)?).into(),
            3 => i16::from_le_bytes(self.array(WHAT)?).into(),
            5 => i32::from_le_bytes(self.array(WHAT)?).into(),
            _ => i64::from_le_bytes(self.array(WHAT)?),
        })
    }

    fn float(&mut self, ty: u32) -> Read<f64> {
        const WHAT: &str = "a float";
        Ok(match ty {
            6 => f32::from_le_bytes(self.array(WHAT)?).into(),
            _ => f64::from_le_bytes(self.array(WHAT)?),
        })
    }

    fn value(&mut self, ty: u32) -> Read<Value> {
        self.count(1)?;
        Ok(match ty {
            0 | 2 | 4 | 10 => Value::Unsigned(self.unsigned(ty)?),
            1 | 3 | 5 | 11 => Value::Signed(self.signed(ty)?),
            6 | 12 => Value::Float(self.float(ty)?),
            7 => Value::Flag(self.flag()?),
            8 => Value::Text(self.text("a text")?),
            9 => Value::List(self.list(1)?),
            other => return Err(format!("there is no type {other} of values")),
        })
    }

    fn list(&mut self, depth: u32) -> Read<List> {
        if depth > MOST_NESTED {
            return Err(format!(
                "arrays within arrays, more than {MOST_NESTED} deep"
            ));
        }
        let ty = self.u32("an array's type")?;
        let n = self.u64("an array's length")?;
        let least = match ty {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 => 4 + 8,
            other => return Err(format!("there is no type {other} of values")),
        };
        self.holds(n, least, "elements of an array")?;
        self.count(n)?;
        let n = 0..n;
        Ok(match ty {
            0 | 2 | 4 | 10 => List::Unsigned(n.map(|_| self.unsigned(ty)).collect::<Read<_>>()?),
            1 | 3 | 5 | 11 => List::Signed(n.map(|_| self.signed(ty)).collect::<Read<_>>()?),
            6 | 12 => List::Floats(n.map(|_| self.float(ty)).collect::<Read<_>>()?),
            7 => List::Flags(n.map(|_| self.flag()).collect::<Read<_>>()?),
            8 => List::Texts(n.map(|_| self.text("a text")).collect::<Read<_>>()?),
            _ => List::Lists(n.map(|_| self.list(depth + 1)).collect::<Read<_>>()?),
        })
    }

    fn count(&mut self, n: u64) -> Read<()> {
        self.values = self.values.saturating_add(n);
        match self.values {
            0..=MOST_VALUES => Ok(()),
            _ => Err(format!("more than {MOST_VALUES} values of metadata")),
        }
    }
}
