//! What stands beside the operands of a problem, by its definition.

use qkv::attention::T5;

/// Buckets of every T5 table.
pub const T5_BUCKETS: u32 = 8;

/// T5's bucket of a key `distance` after the query, by the definition.
pub fn t5_bucket(t5: T5, distance: i64) -> usize {
    let half = if t5.bidirectional {
        T5_BUCKETS / 2
    } else {
        T5_BUCKETS
    } as i64;
    let (side, n) = match (t5.bidirectional, distance > 0) {
        (true, true) => (half, distance),
        (true, false) => (0, -distance),
        (false, _) => (0, (-distance).max(0)),
    };
    let exact = half / 2;
    if n < exact {
        return (side + n) as usize;
    }
    let far = (n as f64 / exact as f64).ln() / (t5.max_distance as f64 / exact as f64).ln();
    let bucket = exact + (far * (half - exact) as f64 + 1e-9).floor() as i64;
    (side + bucket.min(half - 1)) as usize
}

/// An array `[B, H, Q, K]` that is kept only along some axes.
pub struct Spread {
    pub shape: [u32; 4],
    pub values: Vec<f64>,
}

impl Spread {
    pub fn new(extents: [u32; 4], axes: [bool; 4], mut value: impl FnMut(u32) -> f64) -> Self {
        let mut shape = extents;
        for (n, differs) in shape.iter_mut().zip(axes) {
            *n = if differs { *n } else { 1 };
        }
        // The last axis' own index, so that whole columns can be set.
        let values = (0..shape.iter().product()).map(|at| value(at % shape[3]));
        Spread {
            shape,
            values: values.collect(),
        }
    }

    pub fn at(&self, indices: [u32; 4]) -> f64 {
        let at = indices
            .iter()
            .zip(self.shape)
            .fold(0, |at, (&ix, n)| at * n + ix.min(n - 1));
        self.values[at as usize]
    }
}
