//! The shapes that are measured.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;
use qkv::attention::{MAX_HEAD_DIM, MAX_LEN};
use qkv::gpu::DType;
use serde::{Deserialize, Serialize};

/// One attention by its sizes: `B,H,Hk,Q,K,D[,causal][,f16]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    pub batch: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub q_len: u32,
    pub k_len: u32,
    pub dim: u32,
    pub causal: bool,
    pub f16: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum Suite {
    /// Many queries
    Prefill,
    /// One query, and a few on many keys
    Decode,
    /// Models that people run, their prompts and their steps
    Models,
    /// Both at one width and growing lengths, on every route
    Lengths,
}

impl Suite {
    /// In f32, and in f16 where the device has it.
    pub fn shapes(self, has_f16: bool) -> Vec<Shape> {
        let text: Vec<String> = match self {
            Suite::Prefill => [
                "1,8,8,512,512,64",
                "1,8,8,1024,1024,64,causal",
                "1,32,8,1024,1024,128,causal",
                "1,8,8,4096,4096,64,causal",
                "2,12,12,384,384,64",
            ]
            .map(String::from)
            .to_vec(),
            Suite::Decode => [
                "1,8,8,16,512,64",
                "1,8,8,1,512,64",
                "1,32,8,1,4096,128",
                "1,32,8,1,16384,128",
                "8,32,8,1,2048,128",
            ]
            .map(String::from)
            .to_vec(),
            // OPUS-MT's encoder; SmolLM2-135M, Qwen3-0.6B, Llama-3.2-1B and Llama-3.1-8B.
            Suite::Models => [
                "1,8,8,64,64,64",
                "1,9,3,512,512,64,causal",
                "1,9,3,1,2048,64",
                "1,16,8,512,512,128,causal",
                "1,16,8,1,2048,128",
                "1,32,8,512,512,64,causal",
                "1,32,8,1,2048,64",
                "1,32,8,512,512,128,causal",
                "1,32,8,1,8192,128",
            ]
            .map(String::from)
            .to_vec(),
            Suite::Lengths => {
                let prefill = (6..=11).map(|n| format!("1,8,8,{0},{0},64,causal", 1 << n));
                let decode = (8..=15).map(|n| format!("1,32,8,1,{},64", 1 << n));
                prefill.chain(decode).collect()
            }
        };
        let types = if has_f16 { &["", ",f16"][..] } else { &[""] };
        let all = text
            .iter()
            .flat_map(|text| types.iter().map(move |ty| format!("{text}{ty}")));
        all.map(|text| text.parse().expect("a shape of ours"))
            .collect()
    }
}

impl Shape {
    pub fn dtype(&self) -> DType {
        match self.f16 {
            true => DType::F16,
            false => DType::F32,
        }
    }

    /// Pairs of a query and a key that it sees: where causal the last query sees all keys, and each one before it
    /// one fewer, down to none.
    fn pairs(&self) -> f64 {
        let [q, k] = [self.q_len, self.k_len].map(f64::from);
        match self.causal {
            false => q * k,
            true if q <= k => q * k - q * (q - 1.0) / 2.0,
            true => k * (k + 1.0) / 2.0,
        }
    }

    /// 4 B H D for each pair of a query and a key that it sees.
    pub fn flop(&self) -> f64 {
        let all = [self.batch, self.heads, self.dim].map(f64::from);
        4.0 * all.into_iter().product::<f64>() * self.pairs()
    }

    /// Bytes of K and V.
    pub fn kv_bytes(&self) -> f64 {
        let all = [self.batch, self.kv_heads, self.k_len, self.dim];
        let all: f64 = all.into_iter().map(f64::from).product();
        2.0 * all * self.dtype().size() as f64
    }

    /// Bytes of Q, K, V and O, each once: what must be moved.
    pub fn bytes(&self) -> f64 {
        let all = [self.batch, self.heads, self.q_len, self.dim];
        let all: f64 = all.into_iter().map(f64::from).product();
        self.kv_bytes() + 2.0 * all * self.dtype().size() as f64
    }

    /// Whether reading K and V bounds it; else multiply-adds do.
    pub fn is_decode(&self) -> bool {
        self.q_len == 1
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
            dim,
            causal,
            f16,
        } = self;
        write!(f, "{batch},{heads},{kv_heads},{q_len},{k_len},{dim}")?;
        f.write_str(if *causal { ",causal" } else { "" })?;
        f.write_str(if *f16 { ",f16" } else { "" })
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut causal, mut f16, mut sizes) = (false, false, Vec::new());
        for word in text.split(',').map(str::trim) {
            match word {
                "causal" => causal = true,
                "f16" => f16 = true,
                "f32" => f16 = false,
                word => sizes.push(
                    word.parse::<u32>()
                        .map_err(|_| format!("{word:?} is no size, causal, f16 or f32"))?,
                ),
            }
        }
        let &[batch, heads, kv_heads, q_len, k_len, dim] = sizes.as_slice() else {
            return Err(format!(
                "{} sizes, not the six of B,H,Hk,Q,K,D",
                sizes.len()
            ));
        };
        if sizes.contains(&0) || q_len > MAX_LEN || k_len > MAX_LEN || dim > MAX_HEAD_DIM {
            let bound = format!("lengths from 1 to {MAX_LEN}, D to {MAX_HEAD_DIM}");
            return Err(format!("each size is at least 1, {bound}"));
        }
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("Hk, {kv_heads}, must divide H, {heads}"));
        }
        if causal && q_len > k_len {
            return Err(format!(
                "causal with Q, {q_len}, above K, {k_len}: rows without keys"
            ));
        }
        // Elements are counted in 32 bits.
        let most = [heads, q_len].map(u64::from).iter().product::<u64>();
        let least = [kv_heads, k_len].map(u64::from).iter().product::<u64>();
        let elements = u128::from(most.max(least)) * u128::from(batch) * u128::from(dim);
        if elements > u128::from(u32::MAX) {
            return Err(format!("a tensor of {elements} elements; fewer than 2^32"));
        }
        Ok(Shape {
            batch,
            heads,
            kv_heads,
            q_len,
            k_len,
            dim,
            causal,
            f16,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Shape;

    #[test]
    fn flop_are_those_of_the_pairs_that_are_seen() {
        for (q_len, k_len) in [(1, 1), (1, 9), (3, 8), (7, 7), (9, 4), (5, 1)] {
            for causal in [false, true] {
                let (batch, heads, dim) = (2, 6, 5);
                let shape = Shape {
                    batch,
                    heads,
                    kv_heads: 3,
                    q_len,
                    k_len,
                    dim,
                    causal,
                    f16: false,
                };
                // The last query is at the last key.
                let sees = |q: u32, k: u32| !causal || k + q_len <= q + k_len;
                let pairs = (0..q_len).flat_map(|q| (0..k_len).map(move |k| (q, k)));
                let pairs = pairs.filter(|&(q, k)| sees(q, k)).count();
                let flop = 4 * (batch * heads * dim) as usize * pairs;
                assert_eq!(shape.flop(), flop as f64, "{q_len} {k_len} {causal}");
            }
        }
    }
}
