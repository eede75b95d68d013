//! How GGUF stores a tensor's elements: floats, or blocks of small integers that share a scale.

use half::{bf16, f16};

/// A tensor's type. Rows are whole blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(non_camel_case_types, reason = "the names that ggml gives them")]
pub enum Blocks {
    /// 32-bit floats.
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// 16-bit floats with the exponents of f32.
    BF16,
    /// 32 elements: d (f16), then signed bytes q. Elements are d q.
    Q8_0,
    /// 32 elements: d (f16), then nibbles q. Elements are d (q - 8).
    Q4_0,
    /// 32 elements: d and m (f16), then nibbles q. Elements are d q + m.
    Q4_1,
    /// 32 elements: d (f16), the fifth bits, then nibbles. Elements are d (q - 16).
    Q5_0,
    /// 256 elements in eights of 32: d and e (f16), eight pairs of 6-bit s and t, then nibbles q.
    /// Elements are d s q - e t.
    Q4_K,
    /// 256 elements in sixteens of 16: low nibbles, high pairs of bits, 16 signed bytes s, then d (f16).
    /// Elements are d s (q - 32).
    Q6_K,
}

impl Blocks {
    /// The type of that number in a file, or what is known of one that is not read.
    pub(super) fn of(number: u32) -> Result<Blocks, String> {
        const OTHERS: [(u32, &str); 13] = [
            (7, "Q5_1"),
            (9, "Q8_1"),
            (10, "Q2_K"),
            (11, "Q3_K"),
            (13, "Q5_K"),
            (15, "Q8_K"),
            (16, "IQ2_XXS"),
            (17, "IQ2_XS"),
            (18, "IQ3_XXS"),
            (20, "IQ4_NL"),
            (23, "IQ4_XS"),
            (28, "F64"),
            (39, "MXFP4"),
        ];
        Ok(match number {
            0 => Blocks::F32,
            1 => Blocks::F16,
            2 => Blocks::Q4_0,
            3 => Blocks::Q4_1,
            6 => Blocks::Q5_0,
            8 => Blocks::Q8_0,
            12 => Blocks::Q4_K,
            14 => Blocks::Q6_K,
            30 => Blocks::BF16,
            other => {
                let name = OTHERS.iter().find(|(number, _)| *number == other);
                let name = name.map_or(String::new(), |(_, name)| format!(" ({name})"));
                return Err(format!("{other}{name}"));
            }
        })
    }

    /// Elements of a block.
    pub fn elements(self) -> usize {
        match self {
            Blocks::F32 | Blocks::F16 | Blocks::BF16 => 1,
            Blocks::Q8_0 | Blocks::Q4_0 | Blocks::Q4_1 | Blocks::Q5_0 => 32,
            Blocks::Q4_K | Blocks::Q6_K => 256,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Blocks::F32 => 4,
            Blocks::F16 | Blocks::BF16 => 2,
            Blocks::Q8_0 => 34,
            Blocks::Q4_0 => 18,
            Blocks::Q4_1 => 20,
            Blocks::Q5_0 => 22,
            Blocks::Q4_K => 144,
            Blocks::Q6_K => 210,
        }
    }

    /// The elements of whole blocks, as floats.
    pub fn expand(self, bytes: &[u8]) -> Vec<f32> {
        let mut out = Vec::with_capacity(bytes.len() / self.bytes() * self.elements());
        match self {
            Blocks::F32 => each(bytes, |&b: &[u8; 4]| out.push(f32::from_le_bytes(b))),
            Blocks::F16 => each(bytes, |&b: &[u8; 2]| out.push(half_at(&b, 0))),
            Blocks::BF16 => each(bytes, |&b: &[u8; 2]| {
                out.push(bf16::from_le_bytes(b).to_f32());
            }),
            Blocks::Q8_0 => each(bytes, |b: &[u8; 34]| {
                let d = half_at(b, 0);
                out.extend(b[2..].iter().map(|&q| d * (q as i8) as f32));
            }),
            Blocks::Q4_0 => each(bytes, |b: &[u8; 18]| {
                let d = half_at(b, 0);
                out.extend(nibbles(&b[2..]).map(|q| d * (q as f32 - 8.0)));
            }),
            Blocks::Q4_1 => each(bytes, |b: &[u8; 20]| {
                let (d, m) = (half_at(b, 0), half_at(b, 2));
                out.extend(nibbles(&b[4..]).map(|q| d * q as f32 + m));
            }),
            Blocks::Q5_0 => each(bytes, |b: &[u8; 22]| {
                let d = half_at(b, 0);
                out.extend(q5_0(b).map(|q| d * q as f32));
            }),
            Blocks::Q4_K => each(bytes, |b| q4_k(b, &mut out)),
            Blocks::Q6_K => each(bytes, |b| q6_k(b, &mut out)),
        }
        out
    }
}

fn each<const N: usize>(bytes: &[u8], take: impl FnMut(&[u8; N])) {
    bytes.as_chunks::<N>().0.iter().for_each(take);
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The low nibbles of all bytes, then the high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    let low = bytes.iter().map(|byte| byte & 15);
    low.chain(bytes.iter().map(|byte| byte >> 4))
}

/// The integers of a Q5_0 block, from -16 to 15.
fn q5_0(block: &[u8; 22]) -> impl Iterator<Item = i8> {
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    nibbles(&block[6..])
        .enumerate()
        .map(move |(ix, low)| (low | ((high >> ix & 1) as u8) << 4) as i8 - 16)
}

/// Q5_0 blocks as Q8_0 blocks of the same scales and integers.
pub fn q5_0_as_q8_0(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len() / 22 * 34);
    each(bytes, |b: &[u8; 22]| {
        out.extend(&b[..2]);
        out.extend(q5_0(b).map(|q| q as u8));
    });
    out
}

fn q4_k(block: &[u8; 144], out: &mut Vec<f32>) {
    let (d, e) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    // The first four pairs lie in the low six bits of eight bytes; the others have their low nibbles in
    // the last four bytes and their upper two bits above those six.
    let pair = |ix: usize| match ix {
        0..4 => (packed[ix] & 63, packed[ix + 4] & 63),
        _ => (
            packed[ix + 4] & 15 | packed[ix - 4] >> 6 << 4,
            packed[ix + 4] >> 4 | packed[ix] >> 6 << 4,
        ),
    };
    for (two, quants) in block[16..].chunks_exact(32).enumerate() {
        for (ix, q) in nibbles(quants).enumerate() {
            let (s, t) = pair(2 * two + ix / 32);
            out.push(d * s as f32 * q as f32 - e * t as f32);
        }
    }
}

fn q6_k(block: &[u8; 210], out: &mut Vec<f32>) {
    let d = half_at(block, 208);
    for half in 0..2 {
        let (low, high) = (&block[64 * half..], &block[128 + 32 * half..]);
        let scales = &block[192 + 8 * half..];
        for ix in 0..128 {
            // Quarters of 32: the first two have the low nibbles of 64 bytes, the others the high ones.
            let (quarter, column) = (ix / 32, ix % 32);
            let nibble = low[column + 32 * (quarter % 2)] >> (4 * (quarter / 2)) & 15;
            let bits = high[column] >> (2 * quarter) & 3;
            let q = (nibble | bits << 4) as i8 - 32;
            out.push(d * (scales[ix / 16] as i8) as f32 * q as f32);
        }
    }
}
