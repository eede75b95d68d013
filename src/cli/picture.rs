//! Maps of attention as a picture: cells in shades of blue, the tokens along the edges.

use std::path::Path;

use ab_glyph::{Font, FontArc, Glyph, Outline, OutlineCurve, OutlinedGlyph, Point, PxScaleFactor};
use ab_glyph::{Rect, point};
use image::{ImageFormat, Rgb, RgbImage};
use qkv::{Error, Result};

/// A matrix of weights between tokens.
pub struct Map {
    pub title: String,
    pub rows: Vec<String>,
    pub columns: Vec<String>,
    /// One weight for each row and column, row after row.
    pub weights: Vec<f32>,
}

/// The built-in font; see `assets/README.md`.
static FONT: &[u8] = include_bytes!("../../assets/qkv-sans.otf");

/// The most cells along a side.
const MOST_CELLS: usize = 256;
const MARGIN: f32 = 28.0;
/// Between maps, and between a map and the colour bar.
const GAP: f32 = 44.0;
/// Between a label and its cells.
const PAD: f32 = 8.0;
const CAPTION: f32 = 26.0;
const TITLE: f32 = 19.0;
/// The widest a label, and the narrowest a picture, can be.
const LABEL_WIDTH: f32 = 220.0;
const LEAST_WIDTH: f32 = 480.0;
const CAPTION_LINES: usize = 4;
const BAR_WIDTH: f32 = 16.0;
/// Half the height of a capital letter: what to move text down by to centre it on a line.
const HALF_CAPITAL: f32 = 0.36;

const INK: Rgb<u8> = Rgb([28, 32, 38]);
const FAINT: Rgb<u8> = Rgb([96, 104, 116]);
const PAPER: Rgb<u8> = Rgb([255, 255, 255]);
const LINE: Rgb<u8> = Rgb([205, 210, 217]);
const BLANK: Rgb<u8> = Rgb([247, 247, 247]);

/// Draws the maps side by side under a caption, to a PNG file at `out`.
pub fn draw(maps: &[Map], caption: &str, font: Option<&Path>, out: &Path) -> Result<()> {
    for map in maps {
        check(map)?;
    }
    let picture = paint(maps, caption, &Pen::new(font)?);
    super::write_whole(out, |part| {
        let written = picture.save_with_format(part, ImageFormat::Png);
        written.map_err(|e| Error::file(out, e))
    })
}

fn check(map: &Map) -> Result<()> {
    let (rows, columns) = (map.rows.len(), map.columns.len());
    if rows.max(columns) > MOST_CELLS {
        let size = format!("{rows} by {columns} tokens");
        let bound = format!("a picture has at most {MOST_CELLS} along a side");
        return Err(Error::refused(&map.title, size, bound));
    }
    if map.weights.len() != rows * columns {
        let size = format!("{} weights", map.weights.len());
        let bound = format!("{rows} rows by {columns} columns need {}", rows * columns);
        return Err(Error::refused(&map.title, size, bound));
    }
    Ok(())
}

/// Where the parts of a map go: sizes that depend on its labels.
struct Plan {
    /// The side of a cell.
    cell: f32,
    text: f32,
    /// How the column labels lean, in radians: 0 lies flat, π/2 stands up.
    lean: f32,
    /// Left of the cells.
    left: f32,
    /// Above the cells.
    above: f32,
    /// The cells and what hangs over on their right.
    right: f32,
}

impl Plan {
    fn new(map: &Map, pen: &Pen) -> Self {
        let most = map.rows.len().max(map.columns.len()).max(1);
        let cell = (1100.0 / most as f32).floor().clamp(14.0, 46.0);
        let text = (cell - 2.0).clamp(12.0, 18.0);
        let widest = |labels: &[String]| {
            let widths = labels.iter().map(|label| pen.width(label, text));
            widths.fold(0.0, f32::max).min(LABEL_WIDTH)
        };
        let widest_column = widest(&map.columns);
        let lean = match cell {
            _ if widest_column <= cell - 6.0 => 0.0,
            26.0.. => std::f32::consts::FRAC_PI_4,
            _ => std::f32::consts::FRAC_PI_2,
        };
        let cells = cell * map.columns.len() as f32;
        let overhang = |(ix, label): (usize, &String)| {
            let width = pen.width(label, text).min(LABEL_WIDTH) + text;
            (ix as f32 + 0.5) * cell + width * lean.cos()
        };
        let labels = map.columns.iter().enumerate().map(overhang);
        let right = match lean {
            0.0 => cells,
            _ => labels.fold(cells, f32::max),
        };
        Plan {
            cell,
            text,
            lean,
            left: widest(&map.rows) + PAD,
            above: PAD + text * lean.cos() + widest_column * lean.sin(),
            right: right.max(pen.width(&map.title, TITLE)),
        }
    }

    fn width(&self) -> f32 {
        self.left + self.right
    }
}

fn paint(maps: &[Map], caption: &str, pen: &Pen) -> RgbImage {
    let plans: Vec<Plan> = maps.iter().map(|map| Plan::new(map, pen)).collect();
    let bar = BAR_WIDTH + PAD + pen.width("0.5", 15.0);
    let width: f32 = plans.iter().map(|plan| plan.width() + GAP).sum();
    let width = (width + bar).max(LEAST_WIDTH);
    let lines = pen.wrap(caption, CAPTION, width, CAPTION_LINES);

    // From the top: the caption, the titles, the column labels, the cells.
    let titles = MARGIN + (lines.len() as f32 * 1.35 + 0.7) * CAPTION;
    let labels = titles + 1.9 * TITLE;
    let above = plans.iter().map(|plan| plan.above).fold(0.0, f32::max);
    let top = (labels + above).round();
    let heights = maps.iter().zip(&plans);
    let height = heights
        .map(|(map, plan)| map.rows.len() as f32 * plan.cell)
        .fold(140.0, f32::max);

    let size = |side: f32| (side + 2.0 * MARGIN).ceil() as u32;
    let mut picture = RgbImage::from_pixel(size(width), size(top + height - MARGIN), PAPER);
    for (ix, line) in lines.iter().enumerate() {
        let y = MARGIN + (ix as f32 * 1.35 + 0.9) * CAPTION;
        pen.write(&mut picture, line, point(MARGIN, y), CAPTION, 0.0, INK);
    }
    let mut x = MARGIN;
    for (map, plan) in maps.iter().zip(&plans) {
        let left = (x + plan.left).round();
        let title = point(left, titles + TITLE);
        pen.write(&mut picture, &map.title, title, TITLE, 0.0, FAINT);
        paint_map(&mut picture, map, plan, point(left, top), pen);
        x += plan.width() + GAP;
    }
    paint_bar(&mut picture, point(x.round(), top), height.min(276.0), pen);
    picture
}

/// Draws a map whose cells begin at `at`.
fn paint_map(picture: &mut RgbImage, map: &Map, plan: &Plan, at: Point, pen: &Pen) {
    let (cell, text) = (plan.cell, plan.text);
    let columns = map.columns.len();
    for (ix, label) in map.columns.iter().enumerate() {
        let label = pen.fit(label, text, LABEL_WIDTH);
        let middle = at.x + (ix as f32 + 0.5) * cell;
        let start = match plan.lean {
            0.0 => point(middle - pen.width(&label, text) / 2.0, at.y - PAD),
            lean => {
                let (sin, cos) = lean.sin_cos();
                let down = text * HALF_CAPITAL;
                point(middle + down * sin, at.y - PAD + down * cos)
            }
        };
        pen.write(picture, &label, start, text, plan.lean, INK);
    }
    for (ix, label) in map.rows.iter().enumerate() {
        let label = pen.fit(label, text, LABEL_WIDTH);
        let y = at.y + (ix as f32 + 0.5) * cell + text * HALF_CAPITAL;
        let start = point(at.x - PAD - pen.width(&label, text), y);
        pen.write(picture, &label, start, text, 0.0, INK);
    }

    let causal = is_causal(map);
    let (number, gap) = (15.0, if cell < 24.0 { 0.0 } else { 1.0 });
    for (ix, &weight) in map.weights.iter().enumerate() {
        let (row, column) = (ix / columns, ix % columns);
        let corner = point(at.x + column as f32 * cell, at.y + row as f32 * cell);
        let side = cell - gap;
        if causal && column > row {
            fill(picture, corner, side, side, BLANK);
            continue;
        }
        fill(picture, corner, side, side, shade(weight));
        let written = format!("{weight:.2}");
        let width = pen.width(&written, number);
        if width <= cell - 8.0 {
            let ink = match weight {
                0.45.. => PAPER,
                0.005.. => INK,
                _ => FAINT,
            };
            let x = corner.x + (side - width) / 2.0;
            let y = corner.y + side / 2.0 + number * HALF_CAPITAL;
            pen.write(picture, &written, point(x, y), number, 0.0, ink);
        }
    }
}

/// Whether the tokens attend to themselves and to those before them only.
fn is_causal(map: &Map) -> bool {
    let n = map.columns.len();
    let mut weights = map.weights.iter().enumerate();
    n == map.rows.len() && weights.all(|(ix, &weight)| ix % n <= ix / n || weight == 0.0)
}

/// The scale from 0 to 1, with its numbers.
fn paint_bar(picture: &mut RgbImage, at: Point, height: f32, pen: &Pen) {
    let steps = height.floor() - 2.0;
    fill(picture, at, BAR_WIDTH, steps + 2.0, LINE);
    for step in 0..steps as u32 {
        let row = point(at.x + 1.0, at.y + 1.0 + step as f32);
        let colour = shade(1.0 - step as f32 / (steps - 1.0));
        fill(picture, row, BAR_WIDTH - 2.0, 1.0, colour);
    }
    for (text, share) in [("1", 0.0), ("0.5", 0.5), ("0", 1.0)] {
        let y = at.y + 6.0 + (height - 12.0) * share + 15.0 * HALF_CAPITAL;
        let start = point(at.x + BAR_WIDTH + PAD, y);
        pen.write(picture, text, start, 15.0, 0.0, FAINT);
    }
}

/// Fills whole pixels, as far as the picture goes.
fn fill(picture: &mut RgbImage, at: Point, width: f32, height: f32, colour: Rgb<u8>) {
    let right = ((at.x + width) as u32).min(picture.width());
    let bottom = ((at.y + height) as u32).min(picture.height());
    for y in at.y as u32..bottom {
        for x in at.x as u32..right {
            picture.put_pixel(x, y, colour);
        }
    }
}

/// From near-white for 0 to deep blue for 1, in even steps of lightness (Oklab).
fn shade(weight: f32) -> Rgb<u8> {
    let t = if weight.is_nan() {
        0.0
    } else {
        weight.clamp(0.0, 1.0)
    };
    let lightness = 0.975 - 0.655 * t;
    let chroma = 0.008 + 0.5 * t * (1.0 - t) + 0.11 * t * t * t;
    let hue = (240.0 + 24.0 * t).to_radians();
    let (a, b) = (chroma * hue.cos(), chroma * hue.sin());
    let l = (lightness + 0.396_337_78 * a + 0.215_803_76 * b).powi(3);
    let m = (lightness - 0.105_561_346 * a - 0.063_854_17 * b).powi(3);
    let s = (lightness - 0.089_484_18 * a - 1.291_485_5 * b).powi(3);
    let linear = [
        4.076_741_7 * l - 3.307_711_6 * m + 0.230_969_94 * s,
        -1.268_438 * l + 2.609_757_4 * m - 0.341_319_4 * s,
        -0.004_196_086_3 * l - 0.703_418_6 * m + 1.707_614_7 * s,
    ];
    Rgb(linear.map(|part: f32| {
        let part = part.clamp(0.0, 1.0);
        let part = match part {
            0.003_130_8.. => 1.055 * part.powf(1.0 / 2.4) - 0.055,
            _ => 12.92 * part,
        };
        (part * 255.0).round() as u8
    }))
}

/// Writes text. Sizes are those of an em, in pixels.
struct Pen {
    font: FontArc,
    em: f32,
}

impl Pen {
    fn new(path: Option<&Path>) -> Result<Self> {
        let read = |path: &Path| {
            let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
            FontArc::try_from_vec(bytes).map_err(|e| Error::file(path, e))
        };
        let font = match path {
            Some(path) => read(path)?,
            None => FontArc::try_from_slice(FONT).map_err(|e| Error::file("built-in font", e))?,
        };
        let em = font.units_per_em().filter(|&em| em > 0.0);
        let em = em.ok_or_else(|| {
            let name = path.unwrap_or(Path::new("built-in font"));
            Error::file(name, "the font does not say how large its em is")
        })?;
        Ok(Pen { font, em })
    }

    fn width(&self, text: &str, size: f32) -> f32 {
        let widths = text.chars().map(|char| self.advance(char));
        widths.sum::<f32>() * size / self.em
    }

    fn advance(&self, char: char) -> f32 {
        self.font
            .h_advance_unscaled(self.font.glyph_id(plain(char)))
    }

    /// The text, or its beginning where it is wider than `width`.
    fn fit(&self, text: &str, size: f32, width: f32) -> String {
        if self.width(text, size) <= width {
            return text.to_owned();
        }
        let mut left = width - self.width("…", size);
        let fits = |&char: &char| {
            left -= self.advance(char) * size / self.em;
            left >= 0.0
        };
        text.chars().take_while(fits).chain(['…']).collect()
    }

    /// Lines no wider than `width`, broken after spaces where there are any; the last of `most` is cut.
    fn wrap(&self, text: &str, size: f32, width: f32, most: usize) -> Vec<String> {
        let mut lines = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            if lines.len() + 1 == most {
                lines.push(self.fit(rest, size, width));
                break;
            }
            let mut used = 0.0;
            let over = rest.char_indices().find(|&(_, char)| {
                used += self.advance(char) * size / self.em;
                used > width
            });
            // One character at least, however narrow the picture.
            let first = rest.chars().next().map_or(0, char::len_utf8);
            let end = over.map_or(rest.len(), |(at, _)| at.max(first));
            let end = match rest[..end].rfind(' ') {
                Some(space) if end < rest.len() && space > end / 2 => space,
                _ => end,
            };
            lines.push(rest[..end].trim_end().to_owned());
            rest = rest[end..].trim_start();
        }
        lines
    }

    /// Writes from `at`, the left end of the base line, rising at an angle of `lean` radians.
    fn write(
        &self,
        picture: &mut RgbImage,
        text: &str,
        mut at: Point,
        size: f32,
        lean: f32,
        ink: Rgb<u8>,
    ) {
        let factor = size / self.em;
        let (sin, cos) = lean.sin_cos();
        for char in text.chars() {
            let id = self.font.glyph_id(plain(char));
            if let Some(outline) = self.font.outline(id) {
                let glyph = Glyph {
                    id,
                    scale: size.into(),
                    position: at,
                };
                let scale = PxScaleFactor {
                    horizontal: factor,
                    vertical: factor,
                };
                blend(
                    picture,
                    &OutlinedGlyph::new(glyph, turn(outline, sin, cos), scale),
                    ink,
                );
            }
            let advance = self.font.h_advance_unscaled(id) * factor;
            at += point(advance * cos, -advance * sin);
        }
    }
}

/// What to show for a character: line breaks and the like have no shape.
fn plain(char: char) -> char {
    if char.is_control() { ' ' } else { char }
}

/// Turns an outline about its origin, against the clock.
fn turn(outline: Outline, sin: f32, cos: f32) -> Outline {
    let (mut min, mut max) = (
        point(f32::INFINITY, f32::INFINITY),
        point(f32::NEG_INFINITY, f32::NEG_INFINITY),
    );
    let mut turned = |p: Point| {
        let p = point(p.x * cos - p.y * sin, p.x * sin + p.y * cos);
        min = point(min.x.min(p.x), min.y.min(p.y));
        max = point(max.x.max(p.x), max.y.max(p.y));
        p
    };
    let curves = outline.curves.into_iter().map(|curve| match curve {
        OutlineCurve::Line(a, b) => OutlineCurve::Line(turned(a), turned(b)),
        OutlineCurve::Quad(a, b, c) => OutlineCurve::Quad(turned(a), turned(b), turned(c)),
        OutlineCurve::Cubic(a, b, c, d) => {
            OutlineCurve::Cubic(turned(a), turned(b), turned(c), turned(d))
        }
    });
    let curves: Vec<OutlineCurve> = curves.collect();
    // A glyph's top is its bounds' least.
    let bounds = if curves.is_empty() {
        outline.bounds
    } else {
        Rect {
            min: point(min.x, max.y),
            max: point(max.x, min.y),
        }
    };
    Outline { bounds, curves }
}

/// Lays a glyph over the picture, as far as the picture goes.
fn blend(picture: &mut RgbImage, glyph: &OutlinedGlyph, ink: Rgb<u8>) {
    let corner = glyph.px_bounds().min;
    let (left, top) = (corner.x as i64, corner.y as i64);
    glyph.draw(|x, y, cover| {
        let (x, y) = (left + i64::from(x), top + i64::from(y));
        let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y)) else {
            return;
        };
        if let Some(pixel) = picture.get_pixel_mut_checked(x, y) {
            for (under, over) in pixel.0.iter_mut().zip(ink.0) {
                let (from, to) = (f32::from(*under), f32::from(over));
                *under = (from + (to - from) * cover.clamp(0.0, 1.0)).round() as u8;
            }
        }
    });
}
