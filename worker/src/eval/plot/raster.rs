//! A chart as pixels: drawn three times as large and averaged, which smooths the lines.

use super::{Anchor, Chart, Colour, HEIGHT, Mark, WIDTH, font};
use image::{ImageFormat, Rgb, RgbImage, imageops};
use std::io::Cursor;

/// Pixels drawn per pixel, on a side.
const FINE: u32 = 3;
/// Size of a dot of the letters, in pixels of the chart.
const DOT: f64 = 1.75;

/// The chart as the bytes of a PNG file.
pub fn png(chart: &Chart) -> Result<Vec<u8>, String> {
    let (width, height) = (WIDTH as u32, HEIGHT as u32);
    let mut canvas = RgbImage::from_pixel(width * FINE, height * FINE, Rgb([255; 3]));
    for mark in chart.marks() {
        match mark {
            Mark::Line {
                points,
                colour,
                width,
            } => {
                for ends in points.windows(2) {
                    line(&mut canvas, ends[0], ends[1], colour, width);
                }
            }
            Mark::Text { at, text, anchor } => write(&mut canvas, at, &text, anchor),
        }
    }
    let image = imageops::resize(&canvas, width, height, imageops::FilterType::Triangle);
    let mut out = Cursor::new(Vec::new());
    image
        .write_to(&mut out, ImageFormat::Png)
        .map_err(|error| error.to_string())?;
    Ok(out.into_inner())
}

/// A square of `size` pixels of the chart around a place.
fn stamp(canvas: &mut RgbImage, (x, y): (f64, f64), size: f64, colour: Colour) {
    let fine = f64::from(FINE);
    let range = |centre: f64, most: u32| {
        let low = ((centre - size / 2.0) * fine).round().max(0.0) as u32;
        let high = ((centre + size / 2.0) * fine).round().max(0.0) as u32;
        low..high.min(most)
    };
    for py in range(y, canvas.height()) {
        for px in range(x, canvas.width()) {
            canvas.put_pixel(px, py, Rgb(colour));
        }
    }
}

fn line(canvas: &mut RgbImage, from: (f64, f64), to: (f64, f64), colour: Colour, width: f64) {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let steps = (dx.abs().max(dy.abs()) * f64::from(FINE)).ceil().max(1.0);
    for step in 0..=steps as u32 {
        let part = f64::from(step) / steps;
        stamp(canvas, (from.0 + dx * part, from.1 + dy * part), width, colour);
    }
}

fn write(canvas: &mut RgbImage, (x, y): (f64, f64), text: &str, anchor: Anchor) {
    let advance = (font::COLUMNS + 1) as f64 * DOT;
    let length = text.chars().count() as f64 * advance;
    let start = match anchor {
        Anchor::Start => 0.0,
        Anchor::Middle | Anchor::Upward => -length / 2.0,
        Anchor::End => -length,
    };
    for (index, letter) in text.chars().enumerate() {
        for (row, bits) in font::glyph(letter).into_iter().enumerate() {
            for column in (0..font::COLUMNS).filter(|column| bits & (1 << (font::COLUMNS - 1 - column)) != 0)
            {
                let along = start + index as f64 * advance + (column as f64 + 0.5) * DOT;
                let above = (font::ROWS - row) as f64 * DOT - DOT / 2.0;
                let at = match anchor {
                    Anchor::Upward => (x - above, y - along),
                    _ => (x + along, y - above),
                };
                stamp(canvas, at, DOT, super::BLACK);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AREA, CURVES, tests::chart};
    use super::*;

    #[test]
    fn a_picture_shows_the_curve_on_white() {
        let png = png(&chart()).expect("drawn");
        let image = image::load_from_memory(&png).expect("a picture").into_rgb8();
        assert_eq!((image.width(), image.height()), (WIDTH as u32, HEIGHT as u32));
        let [left, right, top, bottom] = AREA;
        let at = |x: f64, y: f64| image.get_pixel(x as u32, y as u32).0;
        let on_curve = at((left + right) / 2.0, (top + bottom) / 2.0);
        let near = |(a, b): (&u8, &u8)| a.abs_diff(*b) < 40;
        assert!(
            on_curve.iter().zip(&CURVES[0]).all(near),
            "averaged with what is beside it: {on_curve:?}"
        );
        assert_eq!(at(left + 20.0, top + 10.0), [255; 3], "beside it");
        // Something is written below the axis.
        let below = bottom as u32 + 10..bottom as u32 + 25;
        let dark = below
            .flat_map(|y| (0..800).map(move |x| (x, y)))
            .filter(|&(x, y)| image.get_pixel(x, y).0[0] < 100);
        assert!(dark.count() > 50);
    }
}
