//! Matrices of weights, as floats or in blocks that kernels expand while they read them.

use crate::gpu::{DType, Recorder, Shader, Tensor};
use crate::{Error, Result};

/// How a matrix is stored. Blocks are of 32 rows of a column, as ggml has them along K.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 4 bytes a weight.
    F32,
    /// 2 bytes a weight.
    F16,
    /// Signed bytes times an f16 scale: 1.0625 bytes a weight.
    Q8_0,
    /// Signed nibbles times an f16 scale: 0.5625 bytes a weight.
    Q4_0,
    /// Nibbles times an f16 scale, and an f16 minimum: 0.625 bytes a weight.
    Q4_1,
}

impl Storage {
    fn name(self) -> &'static str {
        match self {
            Storage::F32 => "f32",
            Storage::F16 => "f16",
            Storage::Q8_0 => "q8_0",
            Storage::Q4_0 => "q4_0",
            Storage::Q4_1 => "q4_1",
        }
    }
}

/// A matrix of weights, W `[K, N]`, as products and embeddings read it: `x W`, or column `id` of it.
/// Cloning shares the buffers.
#[derive(Clone, Debug)]
pub struct Matrix {
    storage: Storage,
    k: u32,
    stride: u32,
    /// Floats `[K, stride]`; of blocks, u32 words of 4 (Q8_0) or 8 rows.
    values: Tensor,
    /// Of blocks. u32 `[K / 32, stride]` of pairs, or half as many words.
    scales: Option<Tensor>,
    /// Whether every element is one of f16, or finite when it is rounded to f16.
    fits_f16: bool,
}

impl Matrix {
    /// A matrix of floats, f32 or f16 `[K, N rounded up to 4]`.
    ///
    /// # Errors
    /// [`Error::Refused`] for another type, or extents that no kernel can read.
    pub fn dense(values: Tensor) -> Result<Matrix> {
        let storage = match values.dtype {
            DType::F32 => Storage::F32,
            DType::F16 => Storage::F16,
            other => {
                let is = format!("{other:?}");
                return Err(Error::refused("a matrix's type", is, "F32 or F16"));
            }
        };
        let &[k, stride] = values.shape() else {
            let is = format!("{:?}", values.shape());
            return Err(Error::refused("a matrix's shape", is, "two extents"));
        };
        if k == 0 || stride == 0 || !stride.is_multiple_of(4) {
            let is = format!("{:?}", values.shape());
            let bound = "rows, and columns in whole fours";
            return Err(Error::refused("a matrix's shape", is, bound));
        }
        Ok(Matrix {
            storage,
            k,
            stride,
            values,
            scales: None,
            fits_f16: storage == Storage::F16,
        })
    }

    /// A matrix in blocks, as ggml has them: for each of its columns the blocks of that row of a file's
    /// tensor. The bytes are sorted anew, so that columns next to each other are read together; not one
    /// more or less is kept but for columns up to a multiple of 4.
    ///
    /// # Errors
    /// [`Error::Refused`] for types that no kernel reads in place, for K that is no multiple of 32, and
    /// for scales that are not finite.
    #[cfg(feature = "models")]
    pub fn blocks(
        gpu: &crate::gpu::Gpu,
        label: &str,
        storage: Storage,
        k: u32,
        columns: &[&[u8]],
    ) -> Result<Matrix> {
        let (bytes, header) = match storage {
            Storage::Q8_0 => (34, 2),
            Storage::Q4_0 => (18, 2),
            Storage::Q4_1 => (20, 4),
            Storage::F32 | Storage::F16 => {
                let is = storage.name();
                return Err(Error::refused(label, is, "q8_0, q4_0 or q4_1"));
            }
        };
        if k == 0 || !k.is_multiple_of(32) {
            let bound = format!("a multiple of 32, as {} blocks are", storage.name());
            return Err(Error::refused(format!("the inputs of {label}"), k, bound));
        }
        let blocks = k as usize / 32;
        let stride = columns.len().next_multiple_of(4);
        let words = (bytes - header) / 4;
        let pairs = storage == Storage::Q4_1;
        let mut values = vec![0u32; blocks * words * stride];
        let mut scales = vec![0u32; blocks * stride / if pairs { 1 } else { 2 }];
        let mut largest = 0.0f32;
        for (n, column) in columns.iter().enumerate() {
            if column.len() != blocks * bytes {
                let is = format!("{} bytes in column {n}", column.len());
                return Err(Error::refused(label, is, format!("{}", blocks * bytes)));
            }
            for (ix, block) in column.chunks_exact(bytes).enumerate() {
                let at = ix * stride + n;
                let (head, quants) = block.split_at(header);
                for half in head.as_chunks::<2>().0 {
                    let scale = half::f16::from_le_bytes(*half);
                    if !scale.is_finite() {
                        let bound = "every scale is finite";
                        return Err(Error::refused(label, scale, bound));
                    }
                    largest = largest.max(scale.to_f32().abs());
                }
                match *head {
                    [a, b, c, d] => scales[at] = u32::from_le_bytes([a, b, c, d]),
                    [a, b, ..] => {
                        scales[at / 2] |= (u16::from_le_bytes([a, b]) as u32) << (16 * (at % 2));
                    }
                    _ => {}
                }
                for word in 0..words {
                    values[(ix * words + word) * stride + n] = match storage {
                        Storage::Q8_0 => word_of_bytes(quants, word),
                        // q - 8 as a signed nibble.
                        Storage::Q4_0 => word_of_nibbles(quants, word) ^ 0x8888_8888,
                        _ => word_of_nibbles(quants, word),
                    };
                }
            }
        }
        let scale_columns = scales.len() / blocks;
        let shape = |rows: usize, columns: usize| [rows as u32, columns as u32];
        Ok(Matrix {
            storage,
            k,
            stride: stride as u32,
            values: gpu.upload_u32(label, &shape(blocks * words, stride), &values)?,
            scales: Some(gpu.upload_u32(label, &shape(blocks, scale_columns), &scales)?),
            // The largest quant is 128 times its scale.
            fits_f16: largest * 129.0 <= half::f16::MAX.to_f32(),
        })
    }

    /// How it is stored.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// Rows, K.
    pub fn k(&self) -> u32 {
        self.k
    }

    /// Columns that are stored, N rounded up to 4.
    pub fn stride(&self) -> u32 {
        self.stride
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        let tensors = [&self.values].into_iter().chain(&self.scales);
        tensors
            .map(|tensor| tensor.len() * tensor.dtype.size())
            .sum()
    }

    pub(super) fn fits_f16(&self) -> bool {
        self.fits_f16
    }

    /// An error for weights in f16 where shaders have none.
    pub(super) fn is_kept(&self, recorder: &Recorder) -> Result<()> {
        match self.storage {
            Storage::F16 => super::is_kept(recorder, "a matrix", DType::F16),
            _ => Ok(()),
        }
    }

    pub(super) fn values(&self) -> &Tensor {
        &self.values
    }

    pub(super) fn scales(&self) -> Option<&Tensor> {
        self.scales.as_ref()
    }

    /// The constants by which a kernel reads this matrix.
    pub(super) fn constants(&self, shader: Shader, software: bool) -> Shader {
        let shader = shader.with("W_TYPE", self.storage.name());
        match self.scales {
            Some(_) => shader.with("SOFTWARE", software),
            None => shader,
        }
    }
}

/// Bytes 4 `word` to 4 `word` + 3.
#[cfg(feature = "models")]
fn word_of_bytes(quants: &[u8], word: usize) -> u32 {
    (0..4).fold(0, |bits, ix| {
        bits | (quants[4 * word + ix] as u32) << (8 * ix)
    })
}

/// Elements 8 `word` to 8 `word` + 7 of a block whose low nibbles are its first half.
#[cfg(feature = "models")]
fn word_of_nibbles(quants: &[u8], word: usize) -> u32 {
    (0..8).fold(0, |bits, ix| {
        let element = 8 * word + ix;
        let nibble = quants[element % 16] >> (4 * (element / 16)) & 15;
        bits | (nibble as u32) << (4 * ix)
    })
}
