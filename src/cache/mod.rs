//! The KV cache of a decoder's self-attention: one block a sequence, or pages that sequences share.

mod book;
mod paged;

pub use book::{Keep, SequenceId};
pub use paged::{PagedCache, PagedExtents, Tables};

use crate::gpu::{DType, Gpu, Tensor};
use crate::{Error, Result};

/// Keys and values of every layer, for R sequences of up to L positions.
pub struct Cache {
    /// Keys by layer. `[R, Hk, L, D]`
    pub k: Vec<Tensor>,
    /// Values by layer. `[R, Hk, L, D]`
    pub v: Vec<Tensor>,
    /// Positions that each sequence fills once this step's token is in. u32 `[R]`
    pub lengths: Tensor,
    /// For beams: the sequence that holds each position of each beam's history. u32 `[R, L]`
    pub rows: Option<Tensor>,
}

/// The extents of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    /// Layers.
    pub layers: u32,
    /// Sequences, R.
    pub rows: u32,
    /// KV heads, Hk.
    pub kv_heads: u32,
    /// Positions, L.
    pub capacity: u32,
    /// Head dim, D.
    pub head_dim: u32,
}

impl Cache {
    /// Bytes of keys and values.
    pub fn bytes(&self) -> u64 {
        self.k.iter().chain(&self.v).map(Tensor::bytes).sum()
    }

    /// An empty cache; every sequence is about to write its first position. Keys and values are stored as `types`
    /// says: floats, q8_0 or q4_0.
    ///
    /// # Errors
    /// [`Error::Refused`] for types that the heads do not fit, [`Error::OutOfMemory`] where it does not fit.
    pub fn new(
        gpu: &Gpu,
        types: [DType; 2],
        extents: Extents,
        shared_histories: bool,
    ) -> Result<Self> {
        let shape = [
            extents.rows,
            extents.kv_heads,
            extents.capacity,
            extents.head_dim,
        ];
        check_types(gpu, types, &shape)?;
        let block = |name, dtype| gpu.empty(name, dtype, &shape);
        Ok(Cache {
            k: (0..extents.layers)
                .map(|_| block("k cache", types[0]))
                .collect::<Result<_>>()?,
            v: (0..extents.layers)
                .map(|_| block("v cache", types[1]))
                .collect::<Result<_>>()?,
            lengths: gpu.upload_u32("lengths", &[extents.rows], &vec![1; extents.rows as usize])?,
            rows: match shared_histories {
                true => {
                    Some(gpu.empty("beam rows", DType::U32, &[extents.rows, extents.capacity])?)
                }
                false => None,
            },
        })
    }
}

/// An error for types in which rows of a head's columns, the last of the shape, cannot be stored.
fn check_types(gpu: &Gpu, types: [DType; 2], shape: &[u32; 4]) -> Result<()> {
    let [_, _, _, head_dim] = *shape;
    for dtype in types {
        let fits = match dtype {
            DType::F32 => true,
            DType::F16 => gpu.caps().f16,
            DType::BF16 => head_dim.is_multiple_of(2),
            DType::Q8_0 | DType::Q4_0 => head_dim.is_multiple_of(32),
            _ => false,
        };
        if !fits {
            let is = format!("{} {shape:?}", dtype.name());
            let bound = "f32, f16 where the device has it, bf16 of even heads, or q8_0 or q4_0 of heads of whole blocks of 32";
            return Err(Error::refused("the cache's storage", is, bound));
        }
    }
    Ok(())
}
