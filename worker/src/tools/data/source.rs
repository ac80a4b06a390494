//! What the subcommands share: opening what a user names, output folders, image files for packing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use image::{RgbImage, codecs::jpeg::JpegEncoder, imageops};

use crate::data::{
    DataError,
    decode::{self, SIDE},
    image_folder::read_image_file,
};

/// Quality of the JPEGs that are made here (not of those that are copied).
pub const JPEG_QUALITY: u8 = 95;

/// A data error with its exit code and hint.
pub fn explain(error: DataError) -> anyhow::Error {
    Failure::from(error).into()
}

/// Creates the output folder.
pub fn output_folder(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))
}

/// `train.rec` of a folder, or the `.rec` itself.
pub fn rec_path(path: &Path) -> PathBuf {
    match path.is_dir() {
        true => path.join("train.rec"),
        false => path.into(),
    }
}

/// An image file's bytes, untouched if they decode to 112x112; another size is scaled and encoded again with `resize`,
/// else refused.
pub fn checked_image(path: &Path, resize: bool) -> anyhow::Result<Vec<u8>> {
    let bytes = read_image_file(path).map_err(explain)?;
    let refuse = |message: String, hint: &str| {
        Failure::new(ExitCode::Failed, format!("{}: {message}", path.display())).hint(hint)
    };
    let image = decode::decode_any(&bytes)
        .map_err(|message| refuse(message, "replace the file or take it out of the set"))?;
    let side = SIDE as u32;
    match (image.width() == side && image.height() == side, resize) {
        (true, _) => Ok(bytes),
        (false, true) => encode(&imageops::resize(
            &image,
            side,
            side,
            imageops::FilterType::Triangle,
        )),
        (false, false) => {
            let message = format!(
                "the image is {}x{}, not {side}x{side}",
                image.width(),
                image.height()
            );
            Err(refuse(
                message,
                "align the faces first, or scale the images with --resize",
            )
            .into())
        }
    }
}

/// An image as JPEG.
pub fn encode(image: &RgbImage) -> anyhow::Result<Vec<u8>> {
    let mut out = Vec::new();
    JpegEncoder::new_with_quality(&mut out, JPEG_QUALITY)
        .encode_image(image)
        .context("encode a JPEG")?;
    Ok(out)
}
