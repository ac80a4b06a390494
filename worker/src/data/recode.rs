//! An image file's bytes on their way into a packed set: untouched if they may be, else decoded, scaled and encoded as JPEG.
//! Pure.

use super::{
    decode::{self, SIDE},
    recordio::{HEADER_BYTES, MAX_PAYLOAD},
};
use image::{RgbImage, codecs::jpeg::JpegEncoder, imageops};

/// Quality of the JPEGs that are made without a choice.
pub const JPEG_QUALITY: u8 = 95;

/// Longest image that fits into a record, in bytes.
const MAX_IMAGE: usize = MAX_PAYLOAD - HEADER_BYTES;

/// What may become of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recode {
    /// Scale another size than 112x112 instead of refusing it.
    pub resize: bool,
    /// Encode every image again, at this quality.
    pub quality: Option<u8>,
    /// Encode PNG as JPEG.
    pub png_to_jpeg: bool,
}

/// Why an image is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What is wrong.
    pub message: String,
    /// What can be done.
    pub hint: &'static str,
}

/// The bytes to store: those that came unless something is to be changed. Every image is decoded once, so that no
/// damaged one is stored.
pub fn recode(bytes: Vec<u8>, how: &Recode) -> Result<Vec<u8>, Refused> {
    let image = decode::decode_any(&bytes).map_err(|message| Refused {
        message,
        hint: "replace the file or take it out of the set",
    })?;
    let side = SIDE as u32;
    let (width, height) = (image.width(), image.height());
    let fits = (width, height) == (side, side);
    if !fits && !how.resize {
        return Err(Refused {
            message: format!("the image is {width}x{height}, not {side}x{side}"),
            hint: "align the faces first (`data align`), or scale the images with --resize",
        });
    }
    let is_png = !decode::is_jpeg(&bytes);
    let again = how.quality.is_some() || (is_png && how.png_to_jpeg);
    let quality = how.quality.unwrap_or(JPEG_QUALITY);
    match (fits, again) {
        // The pixels are few: what makes it so long is beside them, and does not outlive another encoding.
        (true, false) if bytes.len() > MAX_IMAGE => Err(Refused {
            message: format!(
                "the file has {} bytes, more than the {MAX_IMAGE} of a record",
                bytes.len()
            ),
            hint: "--reencode 95 keeps its pixels alone",
        }),
        (true, false) => Ok(bytes),
        (true, true) => encode(&image, quality),
        (false, _) => encode(
            &imageops::resize(&image, side, side, imageops::FilterType::Triangle),
            quality,
        ),
    }
}

/// An image as JPEG.
pub fn encode(image: &RgbImage, quality: u8) -> Result<Vec<u8>, Refused> {
    let mut out = Vec::new();
    match JpegEncoder::new_with_quality(&mut out, quality).encode_image(image) {
        Ok(()) => Ok(out),
        Err(error) => Err(Refused {
            message: format!("encode a JPEG: {error}"),
            hint: "",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};

    fn picture(side: u32) -> RgbImage {
        RgbImage::from_fn(side, side, |x, y| image::Rgb([x as u8, y as u8, 77]))
    }

    fn png(side: u32) -> Vec<u8> {
        let mut out = Vec::new();
        PngEncoder::new(&mut out)
            .write_image(picture(side).as_raw(), side, side, ExtendedColorType::Rgb8)
            .unwrap();
        out
    }

    fn size(bytes: &[u8]) -> (u32, u32) {
        decode::dimensions(bytes).unwrap()
    }

    #[test]
    fn what_need_not_change_is_untouched() {
        let jpeg = encode(&picture(112), 80).unwrap();
        for (bytes, how) in [
            (jpeg.clone(), Recode::default()),
            (png(112), Recode::default()),
            (
                jpeg.clone(),
                Recode {
                    resize: true,
                    quality: None,
                    png_to_jpeg: true,
                },
            ),
        ] {
            assert_eq!(recode(bytes.clone(), &how).unwrap(), bytes);
        }
    }

    #[test]
    fn a_file_that_is_too_long_for_a_record_is_refused_or_encoded_again() {
        let mut bytes = encode(&picture(112), 80).unwrap();
        bytes.resize(MAX_IMAGE + 1, 0);
        let refused = recode(bytes.clone(), &Recode::default()).unwrap_err();
        assert_eq!(
            (refused.message.as_str(), refused.hint),
            (
                "the file has 16777193 bytes, more than the 16777192 of a record",
                "--reencode 95 keeps its pixels alone"
            )
        );
        let again = Recode {
            quality: Some(95),
            ..Recode::default()
        };
        assert!(recode(bytes, &again).unwrap().len() < 20_000);
    }

    #[test]
    fn what_is_to_change_becomes_a_jpeg_of_the_size() {
        let resize = Recode {
            resize: true,
            ..Recode::default()
        };
        let quality = |quality| Recode {
            quality: Some(quality),
            ..Recode::default()
        };
        let png_to_jpeg = Recode {
            png_to_jpeg: true,
            ..Recode::default()
        };
        for (bytes, how) in [
            (png(130), resize),
            (png(112), png_to_jpeg),
            (png(112), quality(50)),
        ] {
            let out = recode(bytes, &how).unwrap();
            assert!(decode::is_jpeg(&out));
            assert_eq!(size(&out), (112, 112));
        }
        let jpeg = encode(&picture(112), 95).unwrap();
        assert!(recode(jpeg.clone(), &quality(30)).unwrap().len() < jpeg.len());
    }

    #[test]
    fn what_cannot_be_taken_says_why() {
        let refused = recode(png(130), &Recode::default()).unwrap_err();
        assert_eq!(refused.message, "the image is 130x130, not 112x112");
        assert!(refused.hint.contains("--resize"));
        let refused = recode(b"GIF8".to_vec(), &Recode::default()).unwrap_err();
        assert!(refused.message.starts_with("neither JPEG nor PNG"), "{refused:?}");
    }
}
