//! Encoded images to 112x112 RGB bytes. Knows image formats, not where the bytes came from.
//!
//! JPEG (baseline, progressive, grayscale) goes through libjpeg-turbo with its default, exact settings, so the pixels are
//! those of OpenCV and Pillow bit for bit; PNG goes through the image crate. A record of a packed data set must have the network's size already, so another size is an error: resizing it silently would hide
//! crops that were aligned for another network. An image folder is raw material: there it is resized.
//!
//! A JPEG has no checksum: damage in its headers and bytes that end early are seen, a changed byte amid the coded pixels
//! may decode to other pixels without an error.

use image::{ImageFormat, ImageReader, Limits, RgbImage, imageops};
use std::cell::RefCell;
use turbojpeg::{Colorspace, Decompressor, Image, PixelFormat};

/// Height and width of a training image, in pixels.
pub const SIDE: usize = 112;
/// Bytes of a decoded image.
pub const PIXEL_BYTES: usize = SIDE * SIDE * 3;
/// Widest and highest image that is decoded, in pixels.
const MAX_SIDE: u32 = 8192;
/// Most scans of a progressive JPEG; encoders write about ten, and a file of thousands is made to keep a decoder busy.
const MAX_SCANS: u32 = 100;

/// A decoded image: rows from the top, pixels from the left, R G B.
pub type Pixels = [u8; PIXEL_BYTES];

/// What happens to an image of another size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherSize {
    /// It is an error.
    Refuse,
    /// It is scaled to 112x112, linearly and with anti-aliasing; the ratio of the sides is not kept.
    Resize,
}

/// Decodes into `out`; the error says what is wrong with the bytes.
pub fn decode(bytes: &[u8], other_size: OtherSize, out: &mut Pixels) -> Result<(), String> {
    // The fast path writes straight into `out`.
    if is_jpeg(bytes) {
        let fits = with_decompressor(|decompressor| {
            let fits = jpeg_size(decompressor, bytes)? == (SIDE, SIDE);
            if fits {
                decompress(decompressor, bytes, out, SIDE, SIDE)?;
            }
            Ok(fits)
        })?;
        if fits {
            return Ok(());
        }
    }
    let image = decode_any(bytes)?;
    let size = (image.width(), image.height());
    let image = match (size, other_size) {
        ((112, 112), _) => image,
        (_, OtherSize::Resize) => {
            imageops::resize(&image, SIDE as u32, SIDE as u32, imageops::FilterType::Triangle)
        }
        ((width, height), OtherSize::Refuse) => {
            return Err(format!("the image is {width}x{height}, not {SIDE}x{SIDE}"));
        }
    };
    out.copy_from_slice(image.as_raw());
    Ok(())
}

/// Decodes at the image's own size.
pub fn decode_any(bytes: &[u8]) -> Result<RgbImage, String> {
    if is_jpeg(bytes) {
        return with_decompressor(|decompressor| {
            let (width, height) = jpeg_size(decompressor, bytes)?;
            let mut image = RgbImage::new(width as u32, height as u32);
            decompress(decompressor, bytes, &mut image, width, height)?;
            Ok(image)
        });
    }
    if bytes.starts_with(b"\x89PNG\r\n\x1a\n") {
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        let mut reader = ImageReader::with_format(std::io::Cursor::new(bytes), ImageFormat::Png);
        reader.limits(limits);
        let image = reader.decode().map_err(|e| format!("broken PNG: {}", tidy(&e)))?;
        return Ok(image.into_rgb8());
    }
    let start = bytes.get(..bytes.len().min(4)).unwrap_or_default();
    Err(match start {
        [] => "the image is empty".into(),
        _ => format!("neither JPEG nor PNG (the image begins with bytes {start:02x?})"),
    })
}

/// Width and height from the header alone.
pub fn dimensions(bytes: &[u8]) -> Result<(u32, u32), String> {
    if is_jpeg(bytes) {
        let (width, height) = with_decompressor(|decompressor| jpeg_size(decompressor, bytes))?;
        return Ok((width as u32, height as u32));
    }
    ImageReader::with_format(std::io::Cursor::new(bytes), ImageFormat::Png)
        .into_dimensions()
        .map_err(|e| format!("neither JPEG nor PNG: {}", tidy(&e)))
}

/// Whether the bytes begin as a JPEG does.
pub fn is_jpeg(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0xd8])
}

/// Calls `f` with this thread's decoder: making one takes as long as decoding a small image.
fn with_decompressor<T>(f: impl FnOnce(&mut Decompressor) -> Result<T, String>) -> Result<T, String> {
    thread_local! {
        static DECOMPRESSOR: RefCell<Option<Decompressor>> = const { RefCell::new(None) };
    }
    DECOMPRESSOR.with_borrow_mut(|slot| {
        let decompressor = match slot {
            Some(decompressor) => decompressor,
            None => {
                let mut fresh = Decompressor::new().map_err(|e| format!("start the JPEG decoder: {e}"))?;
                fresh.set_scan_limit(MAX_SCANS).map_err(|e| broken_jpeg(&e))?;
                slot.insert(fresh)
            }
        };
        let decoded = f(decompressor);
        if decoded.is_err() {
            // It is left in the middle of the image: what comes next would be taken for the rest of it.
            *slot = None;
        }
        decoded
    })
}

/// Width and height, from the header; nothing of their size has been allocated yet.
fn jpeg_size(decompressor: &mut Decompressor, bytes: &[u8]) -> Result<(usize, usize), String> {
    let header = decompressor.read_header(bytes).map_err(|e| broken_jpeg(&e))?;
    let largest = MAX_SIDE as usize;
    if header.width > largest || header.height > largest {
        return Err(format!(
            "the image is {}x{}, at most {MAX_SIDE}x{MAX_SIDE} is decoded",
            header.width, header.height
        ));
    }
    // Printing inks: which red a mix of them is depends on a profile that the decoder does not know.
    if matches!(header.colorspace, Colorspace::CMYK | Colorspace::YCCK) {
        return Err(
            "the JPEG has the colours of print (CMYK), not RGB: convert it with ImageMagick's `magick in.jpg -colorspace sRGB out.jpg`"
                .into(),
        );
    }
    Ok((header.width, header.height))
}

/// Bytes that end early or do not make sense are errors: the decoder would go on with grey, and that be trained on.
fn decompress(
    decompressor: &mut Decompressor,
    bytes: &[u8],
    pixels: &mut [u8],
    width: usize,
    height: usize,
) -> Result<(), String> {
    let image = Image {
        pixels,
        width,
        pitch: width * 3,
        height,
        format: PixelFormat::RGB,
    };
    decompressor.decompress(bytes, image).map_err(|e| broken_jpeg(&e))
}

fn broken_jpeg(error: &turbojpeg::Error) -> String {
    let text = tidy(error);
    // Its name for the function that failed says nothing to a user.
    let what = text.split_once("(): ").map_or(text.as_str(), |(_, what)| what);
    format!("broken JPEG: {what}")
}

/// Libraries' messages in one line, without the quotes and the stop.
fn tidy(error: &impl std::fmt::Display) -> String {
    let text = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
    text.trim_matches(['"', '.']).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, codecs::jpeg::JpegEncoder, codecs::png::PngEncoder};

    fn picture(width: u32, height: u32) -> RgbImage {
        RgbImage::from_fn(width, height, |x, y| {
            image::Rgb([(x * 255 / width) as u8, (y * 255 / height) as u8, 90])
        })
    }

    fn jpeg(image: &RgbImage) -> Vec<u8> {
        let mut out = Vec::new();
        JpegEncoder::new_with_quality(&mut out, 95)
            .encode_image(image)
            .unwrap();
        out
    }

    fn png(bytes: &[u8], width: u32, height: u32, color: ExtendedColorType) -> Vec<u8> {
        let mut out = Vec::new();
        PngEncoder::new(&mut out)
            .write_image(bytes, width, height, color)
            .unwrap();
        out
    }

    fn decoded(bytes: &[u8], other_size: OtherSize) -> Result<Vec<u8>, String> {
        let mut out = [0u8; PIXEL_BYTES];
        decode(bytes, other_size, &mut out).map(|()| out.to_vec())
    }

    #[test]
    fn a_damaged_image_does_no_harm_to_the_next_one() {
        let good = jpeg(&picture(112, 112));
        let known = decoded(&good, OtherSize::Refuse).unwrap();
        let mut damaged = vec![b"\xff\xd8\xff no".to_vec()];
        damaged.extend((2..good.len()).step_by(7).map(|end| good[..end].to_vec()));
        damaged.extend((2..good.len()).step_by(3).map(|at| {
            let mut bytes = good.clone();
            bytes[at] ^= 0x55;
            bytes
        }));
        let mut refused = 0;
        for bytes in &damaged {
            refused += u32::from(decoded(bytes, OtherSize::Refuse).is_err());
            assert_eq!(decoded(&good, OtherSize::Refuse).as_ref(), Ok(&known));
            assert_eq!(dimensions(&good), Ok((112, 112)));
        }
        assert!(refused > 100, "{refused} of {} were damaged", damaged.len());
    }

    #[test]
    fn jpeg_and_png_become_rgb() {
        let image = picture(112, 112);
        let exact = decoded(
            &png(image.as_raw(), 112, 112, ExtendedColorType::Rgb8),
            OtherSize::Refuse,
        )
        .unwrap();
        assert_eq!(&exact, image.as_raw());
        let lossy = decoded(&jpeg(&image), OtherSize::Refuse).unwrap();
        let worst = exact
            .iter()
            .zip(&lossy)
            .map(|(a, b)| a.abs_diff(*b))
            .max()
            .unwrap();
        assert!(worst <= 16, "quality 95 is within {worst} levels");
        let grey: Vec<u8> = (0..112 * 112).map(|i| (i % 251) as u8).collect();
        let from_grey = decoded(&png(&grey, 112, 112, ExtendedColorType::L8), OtherSize::Refuse).unwrap();
        assert!(
            from_grey
                .as_chunks::<3>()
                .0
                .iter()
                .zip(&grey)
                .all(|(rgb, g)| rgb == &[*g; 3])
        );
    }

    #[test]
    fn a_jpeg_for_print_says_so_and_how_to_convert_it() {
        let mut compressor = turbojpeg::Compressor::new().unwrap();
        let inks = vec![40; 112 * 112 * 4];
        let image = Image {
            pixels: &inks[..],
            width: 112,
            pitch: 112 * 4,
            height: 112,
            format: PixelFormat::CMYK,
        };
        let bytes = compressor.compress_to_vec(image).unwrap();
        let others = [decode_any(&bytes).map(drop), dimensions(&bytes).map(drop)];
        for said in [decoded(&bytes, OtherSize::Refuse).map(drop)]
            .into_iter()
            .chain(others)
        {
            let said = said.unwrap_err();
            assert!(
                said.starts_with("the JPEG has the colours of print (CMYK), not RGB: convert it"),
                "{said}"
            );
        }
    }

    #[test]
    fn another_size_is_refused_or_resized() {
        let bytes = jpeg(&picture(160, 120));
        assert_eq!(
            decoded(&bytes, OtherSize::Refuse).unwrap_err(),
            "the image is 160x120, not 112x112"
        );
        let resized = decoded(&bytes, OtherSize::Resize).unwrap();
        let small = picture(112, 112);
        let mean = resized
            .iter()
            .zip(small.as_raw())
            .map(|(a, b)| f64::from(a.abs_diff(*b)))
            .sum::<f64>();
        assert!(mean / (PIXEL_BYTES as f64) < 3.0, "{mean}");
        assert_eq!(dimensions(&bytes), Ok((160, 120)));
    }

    #[test]
    fn broken_images_are_errors() {
        let bytes = jpeg(&picture(112, 112));
        let whole_png = png(picture(112, 112).as_raw(), 112, 112, ExtendedColorType::Rgb8);
        for (broken, expected) in [
            (&b""[..], "the image is empty"),
            (b"GIF89a", "neither JPEG nor PNG"),
            (&bytes[..20], "broken JPEG"),
            (&bytes[..bytes.len() / 2], "broken JPEG"),
            (&bytes[..bytes.len() - 40], "broken JPEG"),
            (&whole_png[..whole_png.len() / 2], "broken PNG"),
        ] {
            let error = decoded(broken, OtherSize::Resize).unwrap_err();
            assert!(error.starts_with(expected), "{} bytes: {error}", broken.len());
        }
    }

    #[test]
    fn no_bytes_make_the_decoder_panic() {
        let bytes = jpeg(&picture(112, 112));
        for seed in 0..300u64 {
            let mut broken = bytes.clone();
            for k in 0..4 {
                let draw = crate::random::bits(seed, crate::random::Purpose::Synthetic, k, 0);
                let at = (draw % broken.len() as u64) as usize;
                broken[at] = (draw >> 32) as u8;
            }
            let _ = decoded(&broken, OtherSize::Refuse);
        }
    }
}
