//! A tensor: a buffer on the device, a type and a shape, dense in row-major order.

use std::sync::Arc;

use super::blocks::row_words;
use super::stats::Stats;

/// How a tensor's elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit floats with the exponents of f32; kernels unpack them by their bits.
    BF16,
    /// 32-bit unsigned integers: token ids, lengths.
    U32,
    /// 32-bit signed integers: offsets.
    I32,
    /// One byte each, zero or not: masks.
    Bool,
    /// Rows in blocks of 32 bytes with an f16 scale each: see [`crate::gpu::blocks`]. For keys and values.
    Q8_0,
    /// The same with half a byte each.
    Q4_0,
}

impl DType {
    /// Bytes of one element; of one word where [`DType::is_quantized`].
    pub fn size(self) -> u64 {
        match self {
            DType::F32 | DType::U32 | DType::I32 | DType::Q8_0 | DType::Q4_0 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Bool => 1,
        }
    }

    /// The type's name in shader templates: WGSL's own, and `bf16` and `bool`, which WGSL cannot store.
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::U32 => "u32",
            DType::I32 => "i32",
            DType::Bool => "bool",
            DType::Q8_0 => "q8_0",
            DType::Q4_0 => "q4_0",
        }
    }

    /// Bytes of a dense tensor of that shape; `u64::MAX` where that is not to be counted.
    pub fn bytes(self, shape: &[u32]) -> u64 {
        let row = match shape.split_last() {
            Some((&columns, rows)) if self.is_quantized() => {
                Some((row_words(self, columns) as u64, rows))
            }
            _ => None,
        };
        let (first, rest) = row.unwrap_or((1, shape));
        rest.iter()
            .try_fold(first, |n, &extent| n.checked_mul(extent as u64))
            .and_then(|n| n.checked_mul(self.size()))
            .unwrap_or(u64::MAX)
    }

    /// Whether rows of it are blocks of quants with a scale each.
    pub fn is_quantized(self) -> bool {
        matches!(self, DType::Q8_0 | DType::Q4_0)
    }

    /// Whether it stores floats.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F16 | DType::BF16)
    }
}

/// The element type of a buffer of that type in WGSL; smaller ones are unpacked from u32 words.
pub fn wgsl_type(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 | DType::Bool | DType::Q8_0 | DType::Q4_0 => "u32",
        other => other.name(),
    }
}

/// A buffer that takes its bytes off the account when the last tensor in it goes.
#[derive(Debug)]
pub(crate) struct Storage {
    pub buffer: wgpu::Buffer,
    pub account: Option<Arc<Stats>>,
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Some(stats) = &self.account {
            stats.freed(self.buffer.size());
        }
    }
}

/// A dense row-major tensor on the device. Cloning shares the buffer.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub(crate) storage: Arc<Storage>,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u32>,
}

impl Tensor {
    /// A tensor in a buffer of the caller's, from its first byte on. The buffer needs `STORAGE` usage, and
    /// `COPY_SRC` and `COPY_DST` for [`super::Gpu::read`] and [`super::Gpu::write`].
    ///
    /// # Errors
    /// [`Refused`](crate::Error::Refused) for another usage, and for a buffer that does not hold the shape in whole
    /// fours of bytes, and four at least, as kernels bind them.
    pub fn from_wgpu(buffer: wgpu::Buffer, dtype: DType, shape: &[u32]) -> crate::Result<Self> {
        let tensor = Tensor {
            storage: Arc::new(Storage {
                buffer,
                account: None,
            }),
            dtype,
            shape: shape.to_vec(),
        };
        if !tensor
            .buffer()
            .usage()
            .contains(wgpu::BufferUsages::STORAGE)
        {
            return Err(crate::Error::refused(
                "buffer",
                format_args!("{:?}", tensor.buffer().usage()),
                "a buffer of STORAGE usage",
            ));
        }
        let have = tensor.buffer().size();
        let need = dtype.bytes(shape).max(1).checked_next_multiple_of(4);
        if need.is_none_or(|need| need > have) {
            let need = need.unwrap_or(u64::MAX);
            return Err(crate::Error::refused(
                "buffer",
                format_args!("{have} bytes"),
                format!("a tensor of shape {shape:?} needs {need} bytes, in whole fours"),
            ));
        }
        Ok(tensor)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Extents, outermost first.
    pub fn shape(&self) -> &[u32] {
        &self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }

    /// Whether an extent is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its elements.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(&self.shape)
    }

    /// An error for a buffer, the caller's, without a usage that copying `what` takes.
    pub(super) fn copies(&self, what: &str, usage: wgpu::BufferUsages) -> crate::Result<()> {
        let has = self.buffer().usage();
        if has.contains(usage) {
            return Ok(());
        }
        let bound = format!("a tensor in a buffer of {usage:?} usage");
        Err(crate::Error::refused(what, format_args!("{has:?}"), bound))
    }

    /// The buffer under the tensor.
    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.storage.buffer
    }

    /// The first elements under another shape, of no more elements than there are.
    #[cfg(feature = "models")]
    pub(crate) fn reshape_prefix(&self, shape: &[u32]) -> Tensor {
        let view = Tensor {
            shape: shape.to_vec(),
            ..self.clone()
        };
        assert!(
            view.len() <= self.len(),
            "a reshape stays within the tensor"
        );
        view
    }
}
