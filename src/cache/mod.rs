//! The KV cache of a decoder's self-attention: one block a sequence, or pages that sequences share.

mod book;
mod paged;

pub use book::{Keep, SequenceId};
pub use paged::{PagedCache, PagedExtents, Tables};

use crate::Result;
use crate::gpu::{DType, Gpu, Tensor};

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
        let blocks = self.k.iter().chain(&self.v);
        blocks.map(|block| block.len() * block.dtype.size()).sum()
    }

    /// An empty cache; every sequence is about to write its first position.
    pub fn new(gpu: &Gpu, dtype: DType, extents: Extents, shared_histories: bool) -> Result<Self> {
        let shape = [
            extents.rows,
            extents.kv_heads,
            extents.capacity,
            extents.head_dim,
        ];
        let block = |name| gpu.empty(name, dtype, &shape);
        Ok(Cache {
            k: (0..extents.layers)
                .map(|_| block("k cache"))
                .collect::<Result<_>>()?,
            v: (0..extents.layers)
                .map(|_| block("v cache"))
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
