//! The tensors of the file, on the host, and what can be said of their values.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::Path;

use clap::ValueEnum;
use half::{bf16, f16};
use qkv::attention::MAX_LEN;
use qkv::gpu::DType;
use qkv::{Error, Result};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

/// The order of the axes of q, k, v and out.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Layout {
    Bhld,
    Blhd,
}

impl Layout {
    /// `[B, H, L, D]` of a shape in this order; and the other way round.
    pub fn swap(self, [b, x, y, d]: [u32; 4]) -> [u32; 4] {
        match self {
            Layout::Bhld => [b, x, y, d],
            Layout::Blhd => [b, y, x, d],
        }
    }
}

/// Elements, dense in row-major order.
pub struct Array<T> {
    pub shape: Vec<u32>,
    pub values: Vec<T>,
}

/// A tensor that the caller's WGSL reads.
pub struct Extra {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u32>,
    pub bytes: Vec<u8>,
}

/// What IN holds. Integers are in range, and q, k, v, bias and mask have four axes; whether shapes agree is
/// the operator's to check.
pub struct Input {
    pub layout: Layout,
    /// In the order of `layout`; `[1, H, T, D]` with `cu_q`.
    pub q: Array<f32>,
    /// `[1, Hk, T, ...]` with `cu_k`.
    pub k: Array<f32>,
    pub v: Array<f32>,
    pub bias: Option<Array<f32>>,
    pub mask: Option<Array<u8>>,
    pub kv_len: Option<Array<u32>>,
    pub q_offset: Option<Array<i32>>,
    pub prefix_len: Option<Array<u32>>,
    pub cu_q: Option<Array<u32>>,
    pub cu_k: Option<Array<u32>>,
    pub sinks: Option<Array<f32>>,
    pub alibi: Option<Array<f32>>,
    pub t5: Option<Array<f32>>,
    pub extra: Vec<Extra>,
}

/// The shapes of the results, as they lie on the device.
pub struct Shapes {
    pub out: [u32; 4],
    pub lse: [u32; 3],
    pub weights: [u32; 4],
}

impl Input {
    /// Reads the file. Tensors of other names than the operator's are extra buffers where there are
    /// functions to read them, and refused where there are none.
    pub fn load(path: &Path, layout: Layout, has_functions: bool) -> Result<Input> {
        let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|e| Error::file(path, format_args!("not a whole safetensors file: {e}")))?;
        let mut file = File {
            path,
            tensors: file.tensors().into_iter().collect(),
        };
        let lengths = 0..=i64::from(u32::MAX);
        let cu_q = file.integers("cu_q", lengths.clone())?;
        let cu_k = file.integers("cu_k", lengths)?;
        let q = file.operand("q", layout, cu_q.is_some())?;
        let k = file.operand("k", layout, cu_k.is_some())?;
        let v = file.operand("v", layout, cu_k.is_some())?;
        let [_, _, q_len, _] = layout.swap(axes(&q));
        let [_, _, k_len, _] = layout.swap(axes(&k));
        rises("cu_q", &cu_q, q_len)?;
        rises("cu_k", &cu_k, k_len)?;
        let keys = 0..=i64::from(k_len);
        let far = i64::from(MAX_LEN);
        let mut input = Input {
            layout,
            q,
            k,
            v,
            bias: file.floats("bias")?,
            mask: file.mask()?,
            kv_len: file.integers("kv_len", keys.clone())?,
            q_offset: file.integers("q_offset", -far..=far)?,
            prefix_len: file.integers("prefix_len", keys)?,
            cu_q,
            cu_k,
            sinks: file.floats("sinks")?,
            alibi: file.floats("alibi")?,
            t5: file.floats("t5")?,
            extra: Vec::new(),
        };
        let cells = input.cells();
        if let Some(bias) = &mut input.bias {
            bias.broadcast("bias", cells)?;
        }
        if let Some(mask) = &mut input.mask {
            mask.broadcast("mask", cells)?;
        }
        input.extra = file.rest(has_functions)?;
        Ok(input)
    }

    /// B, which `cu_q` counts.
    pub fn batch(&self) -> u32 {
        match &self.cu_q {
            Some(cu_q) => (cu_q.values.len() as u32).saturating_sub(1),
            None => self.q.shape[0],
        }
    }

    /// `[B, H, Q, K]`, of which a bias has one element each.
    pub fn cells(&self) -> [u32; 4] {
        let [_, h, q_len, _] = self.layout.swap(axes(&self.q));
        let [_, _, k_len, _] = self.layout.swap(axes(&self.k));
        [self.batch(), h, q_len, k_len]
    }

    pub fn shapes(&self) -> Shapes {
        let [b, h, q_len, _] = self.layout.swap(axes(&self.q));
        let [_, _, k_len, dv] = self.layout.swap(axes(&self.v));
        Shapes {
            out: self.layout.swap([b, h, q_len, dv]),
            lse: [b, h, q_len],
            weights: [b, h, q_len, k_len],
        }
    }
}

/// The shape of an operand.
pub fn axes(operand: &Array<f32>) -> [u32; 4] {
    let shape = operand.shape.as_slice().try_into();
    shape.expect("operands were given four axes")
}

/// That sequences follow each other within `rows` rows.
fn rises(name: &str, starts: &Option<Array<u32>>, rows: u32) -> Result<()> {
    let Some(Array { values, .. }) = starts else {
        return Ok(());
    };
    for (ix, pair) in values.windows(2).enumerate() {
        if pair[1] < pair[0] {
            return Err(Error::refused(
                name,
                format_args!("{} behind {} at {}", pair[1], pair[0], ix + 1),
                "no sequence may end before it begins: numbers that rise",
            ));
        }
    }
    match values.last() {
        Some(&end) if end > rows => Err(Error::refused(
            name,
            format_args!("{end} at its end"),
            format!("at most the {rows} rows that there are"),
        )),
        _ => Ok(()),
    }
}

impl<T> Array<T> {
    /// Axes of extent 1 in front until there are four, if each is then 1 or that of `cells`.
    fn broadcast(&mut self, name: &str, cells: [u32; 4]) -> Result<()> {
        let missing = 4usize.checked_sub(self.shape.len());
        let wide: Option<Vec<u32>> = missing.map(|n| [vec![1; n], self.shape.clone()].concat());
        let fits = |wide: &Vec<u32>| wide.iter().zip(cells).all(|(&n, cell)| n == 1 || n == cell);
        match wide.filter(fits) {
            Some(wide) => self.shape = wide,
            None => {
                let bound = format!("it must broadcast to [B, H, Q, K], {cells:?}");
                return Err(Error::refused(
                    name,
                    format_args!("{:?}", self.shape),
                    bound,
                ));
            }
        }
        Ok(())
    }
}

impl<T> Array<T> {
    /// The element that serves there, where axes of extent 1 repeat.
    pub fn at(&self, indices: [u32; 4]) -> &T {
        let axes = self.shape.iter().zip(indices);
        let at = axes.fold(0, |at, (&n, ix)| at * n as usize + ix.min(n - 1) as usize);
        &self.values[at]
    }
}

/// The tensors that were not taken yet.
struct File<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, TensorView<'a>>,
}

impl File<'_> {
    fn shape(&self, name: &str, view: &TensorView) -> Result<Vec<u32>> {
        let shape = view.shape().iter().map(|&n| u32::try_from(n));
        shape.collect::<std::result::Result<_, _>>().map_err(|_| {
            let value = format!("{:?}", view.shape());
            Error::refused(name, value, "extents are counted in 32 bits")
        })
    }

    fn floats(&mut self, name: &str) -> Result<Option<Array<f32>>> {
        let Some(view) = self.tensors.remove(name) else {
            return Ok(None);
        };
        let data = view.data();
        let pairs = data.as_chunks::<2>().0.iter();
        let values = match view.dtype() {
            Dtype::F16 => pairs.map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => pairs.map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            Dtype::F32 => {
                let fours = data.as_chunks::<4>().0.iter();
                fours.map(|&b| f32::from_le_bytes(b)).collect()
            }
            Dtype::F64 => {
                let eights = data.as_chunks::<8>().0.iter();
                eights.map(|&b| f64::from_le_bytes(b) as f32).collect()
            }
            other => return Err(wrong_type(name, other, "F32, F16, BF16 or F64")),
        };
        let shape = self.shape(name, &view)?;
        Ok(Some(Array { shape, values }))
    }

    /// q, k or v: four axes, of which ragged ones lack the batch.
    fn operand(&mut self, name: &str, layout: Layout, ragged: bool) -> Result<Array<f32>> {
        let found = self.floats(name)?;
        let missing = || Error::file(self.path, format_args!("it has no tensor {name}"));
        let mut operand = found.ok_or_else(missing)?;
        let (axes, wanted) = match (layout, ragged) {
            (Layout::Bhld, false) => (4, "four axes, [batch, heads, length, depth]"),
            (Layout::Blhd, false) => (4, "four axes, [batch, length, heads, depth]"),
            (Layout::Bhld, true) => (3, "three axes, [heads, length of all, depth]"),
            (Layout::Blhd, true) => (3, "three axes, [length of all, heads, depth]"),
        };
        if operand.shape.len() != axes {
            let value = format!("{:?}", operand.shape);
            return Err(Error::refused(name, value, wanted));
        }
        if ragged {
            operand.shape.insert(0, 1);
        }
        Ok(operand)
    }

    fn mask(&mut self) -> Result<Option<Array<u8>>> {
        let Some(view) = self.tensors.remove("mask") else {
            return Ok(None);
        };
        if !matches!(view.dtype(), Dtype::BOOL | Dtype::U8) {
            return Err(wrong_type("mask", view.dtype(), "BOOL or U8"));
        }
        Ok(Some(Array {
            shape: self.shape("mask", &view)?,
            values: view.data().to_vec(),
        }))
    }

    /// Integers of any size, each within the range.
    fn integers<T: TryFrom<i64>>(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<Array<T>>> {
        let Some(view) = self.tensors.remove(name) else {
            return Ok(None);
        };
        let bytes = match view.dtype() {
            Dtype::I64 | Dtype::U64 => 8,
            Dtype::I32 | Dtype::U32 => 4,
            Dtype::I16 | Dtype::U16 => 2,
            Dtype::I8 | Dtype::U8 => 1,
            other => return Err(wrong_type(name, other, "integers")),
        };
        let signed = matches!(
            view.dtype(),
            Dtype::I64 | Dtype::I32 | Dtype::I16 | Dtype::I8
        );
        let value = |(ix, element): (usize, &[u8])| {
            let negative = signed && element.last().is_some_and(|&byte| byte >= 128);
            let mut wide = [if negative { 255 } else { 0 }; 16];
            wide[..bytes].copy_from_slice(element);
            let value = i128::from_le_bytes(wide);
            let narrow = i64::try_from(value).ok().filter(|n| range.contains(n));
            narrow.and_then(|n| T::try_from(n).ok()).ok_or_else(|| {
                let bound = format!("from {} to {}", range.start(), range.end());
                Error::refused(name, format_args!("{value} at {ix}"), bound)
            })
        };
        let elements = view.data().chunks_exact(bytes).enumerate();
        Ok(Some(Array {
            shape: self.shape(name, &view)?,
            values: elements.map(value).collect::<Result<_>>()?,
        }))
    }

    /// All that is left: extra buffers.
    fn rest(&mut self, has_functions: bool) -> Result<Vec<Extra>> {
        let mut extra = Vec::new();
        for (name, view) in std::mem::take(&mut self.tensors) {
            if !has_functions {
                return Err(Error::refused(
                    format!("a tensor of {}", self.path.display()),
                    &name,
                    "none of the operator's; others are for --score-mod and --mask-mod",
                ));
            }
            let dtype = match view.dtype() {
                Dtype::F32 => DType::F32,
                Dtype::I32 => DType::I32,
                Dtype::U32 => DType::U32,
                other => return Err(wrong_type(&name, other, "F32, I32 or U32")),
            };
            extra.push(Extra {
                dtype,
                shape: self.shape(&name, &view)?,
                bytes: view.data().to_vec(),
                name,
            });
        }
        Ok(extra)
    }
}

fn wrong_type(name: &str, is: Dtype, wanted: &str) -> Error {
    Error::refused(name, format_args!("{is:?}"), wanted)
}
