//! Where the elements of one tensor lie.

use qkv::attention::View;
use qkv::gpu::Tensor;

use super::Place;
use crate::compare::Canary;

/// Where the elements of one tensor lie.
#[derive(Clone, Copy)]
pub struct Lay {
    pub extents: [u32; 4],
    pub offset: u32,
    pub strides: [u32; 4],
    /// Cells of the buffer.
    pub cells: u32,
}

impl Lay {
    pub fn new(place: Place, extents: [u32; 4]) -> Lay {
        let [b, h, l, d] = extents;
        let (offset, strides) = match place {
            Place::Dense => (0, [h * l * d, l * d, d, 1]),
            Place::Columns | Place::Packed => (0, [l * h * d, d, h * d, 1]),
            Place::Gaps(n) => {
                let row = d + n;
                let head = l * row + n;
                (2 * n, [h * head + n, head, row, 1])
            }
            Place::Transposed => (0, [h * l * d, l * d, 1, l]),
        };
        // A tail, so that there is something to overwrite behind the last row.
        let cells = offset + b * strides[0] + 16;
        Lay {
            extents,
            offset,
            strides,
            cells,
        }
    }

    /// The first cell of every row, in the order of [B, H, L].
    fn rows(&self) -> impl Iterator<Item = usize> {
        let Lay {
            extents: [b, h, l, _],
            offset,
            strides: [sb, sh, sl, _],
            ..
        } = *self;
        (0..b).flat_map(move |b| {
            (0..h).flat_map(move |h| {
                (0..l).map(move |i| (offset + b * sb + h * sh + i * sl) as usize)
            })
        })
    }

    /// Writes dense values to their cells.
    pub fn put(&self, cells: &mut [f32], values: &[f64]) {
        let (d, step) = (self.extents[3] as usize, self.strides[3] as usize);
        for (at, row) in self.rows().zip(values.chunks(d)) {
            for (ix, &value) in row.iter().enumerate() {
                cells[at + ix * step] = value as f32;
            }
        }
    }

    pub fn view<'t>(&self, tensor: &'t Tensor) -> View<'t> {
        View::strided(tensor, self.extents, self.offset, self.strides)
            .expect("a view in its buffer")
    }

    /// Takes the rows out of what was read back. An error where a cell outside them was written.
    pub fn take<T: Copy + PartialEq + std::fmt::LowerHex>(
        &self,
        canary: Canary<T>,
        mut cells: Vec<T>,
    ) -> Result<Vec<T>, String> {
        let (d, step) = (self.extents[3] as usize, self.strides[3] as usize);
        let mut values = Vec::new();
        for at in self.rows() {
            for ix in 0..d {
                values.push(std::mem::replace(&mut cells[at + ix * step], canary.0));
            }
        }
        canary.untouched_outside("out", &cells, 0..0)?;
        Ok(values)
    }
}
