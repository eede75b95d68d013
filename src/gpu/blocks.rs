//! Rows of floats in blocks of 32 that share a scale, as in ggml: `q8_0` and `q4_0`.
//!
//! A row is cut into pairs of blocks. A pair is one word with the two scales (f16, the first one below), then
//! the quants of the first block and those of the second: bytes from -127 to 127, four a word, or halves of
//! bytes from 0 to 15, eight a word, of which 8 is zero; the first column lies lowest. A last block without
//! a partner has a word for its scale too. So 64 columns take 17 words or 9.

use super::DType;

/// Columns that share a scale.
pub const BLOCK: usize = 32;

/// 32-bit words of a row of `columns`, which are whole blocks.
pub(crate) fn row_words(dtype: DType, columns: u32) -> u32 {
    let blocks = columns.div_ceil(BLOCK as u32);
    let quants = match dtype {
        DType::Q4_0 => 4,
        _ => 8,
    };
    blocks * quants + blocks.div_ceil(2)
}

/// Rows of `columns` values as words. The scale is the largest magnitude over 127, or the value of largest
/// magnitude over -8; a block that holds a NaN is all NaN.
pub(crate) fn quantize(dtype: DType, columns: u32, values: &[f32]) -> Vec<u32> {
    let mut words = Vec::new();
    for row in values.chunks(columns.max(1) as usize) {
        for pair in row.chunks(2 * BLOCK) {
            let at = words.len();
            words.push(0);
            for (ix, block) in pair.chunks(BLOCK).enumerate() {
                let largest = block
                    .iter()
                    .fold(0.0f32, |a, &b| if b.abs() > a.abs() { b } else { a });
                let scale = match dtype {
                    _ if block.iter().any(|x| x.is_nan()) => f32::NAN,
                    DType::Q4_0 => largest / -8.0,
                    _ => largest.abs() / 127.0,
                };
                let stored = half::f16::from_f32(scale);
                words[at] |= u32::from(stored.to_bits()) << (16 * ix);
                let over = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                match dtype {
                    DType::Q4_0 => words.extend(block.chunks(8).map(|some| {
                        let quant = |x: f32| ((x * over).round() + 8.0).clamp(0.0, 15.0) as u32;
                        let each = some.iter().enumerate();
                        each.fold(0, |word, (ix, &x)| word | quant(x) << (4 * ix))
                    })),
                    _ => words.extend(block.chunks(4).map(|some| {
                        let quant = |x: f32| (x * over).round().clamp(-127.0, 127.0) as i8 as u8;
                        let each = some.iter().enumerate();
                        each.fold(0, |word, (ix, &x)| word | u32::from(quant(x)) << (8 * ix))
                    })),
                }
            }
        }
    }
    words
}

/// The values of such rows.
pub(crate) fn dequantize(dtype: DType, columns: u32, words: &[u32]) -> Vec<f32> {
    let quants = if dtype == DType::Q4_0 { 4 } else { 8 };
    let mut values = Vec::new();
    for row in words.chunks(row_words(dtype, columns).max(1) as usize) {
        for pair in row.chunks(1 + 2 * quants) {
            for (ix, block) in pair[1..].chunks(quants).enumerate() {
                let scale = half::f16::from_bits((pair[0] >> (16 * ix)) as u16).to_f32();
                for &word in block {
                    values.extend((0..32 / quants).map(|n| match dtype {
                        DType::Q4_0 => scale * ((word >> (4 * n) & 15) as f32 - 8.0),
                        _ => scale * f32::from((word >> (8 * n)) as u8 as i8),
                    }));
                }
            }
        }
    }
    values
}
