//! What is measured: a shape in words.

use std::fmt;
use std::str::FromStr;

use crate::gpu::{Caps, DType};
use crate::{Error, Result};

/// An attention to be measured: dense tensors of numbers about normal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// B.
    pub batch: u32,
    /// H, query heads.
    pub heads: u32,
    /// Hk, KV heads.
    pub kv_heads: u32,
    /// Q.
    pub q_len: u32,
    /// K.
    pub k_len: u32,
    /// D.
    pub head_dim: u32,
    /// Dv.
    pub value_dim: u32,
    /// Of all tensors.
    pub dtype: DType,
    /// Queries see keys up to their own position, the last one all.
    pub causal: bool,
    /// And so many before it.
    pub window: Option<u32>,
    /// A mask of its own hides the last quarter of the keys.
    pub masked: bool,
    /// With [`Options::f16_math`](crate::attention::Options::f16_math).
    pub f16_math: bool,
}

const fn plain([batch, heads, kv_heads, q_len, k_len, dim]: [u32; 6], causal: bool) -> Shape {
    Shape {
        batch,
        heads,
        kv_heads,
        q_len,
        k_len,
        head_dim: dim,
        value_dim: dim,
        dtype: DType::F32,
        causal,
        window: None,
        masked: false,
        f16_math: false,
    }
}

/// Prefill, cross-attention and decode as models have them.
pub const SHAPES: [Shape; 10] = [
    plain([1, 8, 8, 512, 512, 64], false),
    plain([1, 8, 8, 1024, 1024, 64], true),
    plain([1, 32, 8, 1024, 1024, 128], true),
    plain([1, 8, 8, 4096, 4096, 64], true),
    plain([2, 12, 12, 384, 384, 64], false),
    plain([1, 8, 8, 16, 512, 64], false),
    plain([1, 8, 8, 1, 512, 64], false),
    plain([1, 32, 8, 1, 4096, 128], false),
    plain([1, 32, 8, 1, 16384, 128], false),
    plain([8, 32, 8, 1, 2048, 128], false),
];

/// [`SHAPES`], each in f32 and, where the device has it, in f16.
pub fn default_shapes(caps: &Caps) -> Vec<Shape> {
    let types: &[DType] = match caps.f16 {
        true => &[DType::F32, DType::F16],
        false => &[DType::F32],
    };
    let each = SHAPES.iter().flat_map(|&shape| {
        let types = types.iter();
        types.map(move |&dtype| Shape { dtype, ..shape })
    });
    each.collect()
}

/// Elements of one tensor.
const MOST: u64 = 1 << 30;

impl Shape {
    /// Heads of all batch rows.
    pub(super) fn all_heads(&self) -> f64 {
        f64::from(self.batch) * f64::from(self.heads)
    }

    /// Half of it, batch rows or else heads, for a device that takes long.
    pub(super) fn half(&self) -> Option<Shape> {
        let mut half = *self;
        match (self.batch, self.kv_heads) {
            (1, 1) => return None,
            (1, kv_heads) => {
                half.kv_heads = kv_heads / 2;
                half.heads = half.kv_heads * (self.heads / kv_heads);
            }
            (batch, _) => half.batch = batch / 2,
        }
        Some(half)
    }
}

/// `B,H,Hk,Q,K,D`, then in any order `causal`, `window=N`, `masked`, `dv=N`, `f16-math`, and `f32`, `f16` or
/// `bf16`.
impl FromStr for Shape {
    type Err = Error;

    fn from_str(text: &str) -> Result<Shape> {
        let refuse = |bound: &str| Err(Error::refused("a shape", format_args!("{text:?}"), bound));
        let words: Vec<&str> = text.split(',').map(str::trim).collect();
        let number = |word: &str| word.parse::<u32>().ok().filter(|&n| n > 0);
        let sizes = words.iter().map_while(|word| number(word));
        let sizes: Vec<u32> = sizes.collect();
        let Ok(sizes) = <[u32; 6]>::try_from(sizes) else {
            return refuse("six numbers above zero, B,H,Hk,Q,K,D, then words");
        };
        let mut shape = plain(sizes, false);
        for word in &words[6..] {
            match (*word, word.split_once('=')) {
                ("causal", _) => shape.causal = true,
                ("masked", _) => shape.masked = true,
                ("f16-math", _) => shape.f16_math = true,
                ("f32", _) => shape.dtype = DType::F32,
                ("f16", _) => shape.dtype = DType::F16,
                ("bf16", _) => shape.dtype = DType::BF16,
                (_, Some(("window", n))) if n.parse::<u32>().is_ok() => {
                    shape.window = n.parse().ok();
                }
                (_, Some(("dv", n))) if number(n).is_some() => {
                    shape.value_dim = number(n).unwrap_or(1);
                }
                _ => {
                    return refuse(
                        "words are causal, window=N, masked, dv=N, f16-math, f32, f16, bf16",
                    );
                }
            }
        }
        let Shape {
            batch,
            heads,
            kv_heads,
            q_len,
            k_len,
            head_dim,
            value_dim,
            ..
        } = shape;
        let dim = head_dim.max(value_dim);
        let large = [[batch, heads, q_len, dim], [batch, kv_heads, k_len, dim]];
        for extents in large {
            let mut extents = extents.into_iter().map(u64::from);
            let elements = extents.try_fold(1u64, |all, n| all.checked_mul(n));
            if elements.is_none_or(|elements| elements > MOST) {
                return refuse("at most 2^30 elements in a tensor");
            }
        }
        Ok(shape)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Shape {
            batch,
            heads,
            kv_heads,
            q_len,
            k_len,
            head_dim,
            value_dim,
            dtype,
            ..
        } = self;
        write!(f, "{batch},{heads},{kv_heads},{q_len},{k_len},{head_dim}")?;
        if value_dim != head_dim {
            write!(f, ",dv={value_dim}")?;
        }
        if self.causal {
            write!(f, ",causal")?;
        }
        if let Some(window) = self.window {
            write!(f, ",window={window}")?;
        }
        if self.masked {
            write!(f, ",masked")?;
        }
        if self.f16_math {
            write!(f, ",f16-math")?;
        }
        write!(f, ",{}", dtype.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_reads_what_it_writes() {
        for text in [
            "1,8,8,512,512,64,f32",
            "2,12,4,1,384,64,dv=80,causal,window=16,masked,bf16",
            "1,1,1,1,1,1,window=0,f16",
            "1,2,2,64,64,32,f16-math,f16",
        ] {
            assert_eq!(text.parse::<Shape>().unwrap().to_string(), text);
        }
        let short: Shape = " 1,2,2, 3,4,5 ,causal".parse().unwrap();
        assert_eq!(short.to_string(), "1,2,2,3,4,5,causal,f32");
        for text in [
            "",
            "1,2,3",
            "1,8,8,512,512",
            "0,8,8,512,512,64",
            "1,8,8,512,512,64,64",
            "1,8,8,512,512,64,casual",
            "1,8,8,512,512,64,window=x",
            "1,8,8,512,512,64,dv=0",
            "4294967295,4294967295,1,4294967295,1,4294967295",
            "1,1,1,1,536870912,64",
        ] {
            let refused = text.parse::<Shape>();
            assert!(matches!(refused, Err(Error::Refused { .. })), "{text}");
        }
    }

    #[test]
    fn a_shape_is_halved_down_to_one_kv_head() {
        let mut shape: Shape = "3,12,6,5,7,8".parse().unwrap();
        let mut seen = Vec::new();
        while let Some(half) = shape.half() {
            shape = half;
            seen.push([shape.batch, shape.heads, shape.kv_heads]);
        }
        assert_eq!(seen, [[1, 12, 6], [1, 6, 3], [1, 2, 1]]);
    }
}
