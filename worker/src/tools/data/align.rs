//! `data align`: the faces of photographs, cut out by five landmarks each, as a folder of crops or as a packed set.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::OsString,
    fs,
    io::Write as _,
    path::{Component, Path, PathBuf},
};

use anyhow::Context;
use arcface_proto::failure::{ExitCode, Failure};
use image::RgbImage;
use rayon::prelude::*;

use super::{
    progress,
    source::{check_names, explain, new_file, with_threads},
};
use crate::{
    data::{
        decode::{self, PIXEL_BYTES, SIDE},
        image_folder::read_image_file,
        recode::{self, JPEG_QUALITY},
        recordio_write::LayoutWriter,
        repack,
    },
    tools::infer::{self, Picture},
};

/// Arguments of `data align`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:\n  \
    arcface-worker data align --landmarks faces.csv -o crops\n  \
    arcface-worker data align --landmarks photographs/landmarks.json -o packed/train.rec\n\n\
    Crops keep the folders of their photographs, so that `data pack` can take them. The second face of a photograph gets \
    _2 at the end of its name.")]
pub struct AlignArgs {
    /// Where faces are: one line a face with the image and x, y of both eyes, nose and both corners of the mouth, left to right
    /// as in the image, separated by commas or tabs; or JSON, [{"image": "a.jpg", "landmarks": [[x, y], ..]}, ..]. Relative
    /// paths are looked for here, then beside FILE.
    #[arg(long, value_name = "FILE")]
    landmarks: PathBuf,
    /// A folder for the crops, not there yet; or a .rec file, where each folder of photographs is an identity.
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Quality of the crops' JPEG.
    #[arg(long, value_name = "QUALITY", default_value_t = JPEG_QUALITY, value_parser = clap::value_parser!(u8).range(1..=100))]
    quality: u8,
    /// Leave out photographs that cannot be read and faces that lie outside of theirs, instead of stopping at the first.
    #[arg(long)]
    skip_damaged: bool,
    /// Threads [default: one a core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Replace a .rec that is there; a folder never is.
    #[arg(long)]
    force: bool,
}

/// A face and where its crop goes.
struct Face {
    photograph: PathBuf,
    place: infer::Face,
    /// Relative to the output folder.
    crop: PathBuf,
}

pub fn run(args: &AlignArgs) -> anyhow::Result<()> {
    let beside = args.landmarks.parent().unwrap_or(Path::new(""));
    let faces = name_crops(infer::faces(&args.landmarks)?, beside)?;
    let is_rec = args.output.extension().is_some_and(|ending| ending == "rec");
    let threads = args.threads.map(usize::from);
    let (crops, skipped) = with_threads(threads, || match is_rec {
        true => to_set(args, &faces),
        false => to_folder(args, &faces),
    })?;
    let mut out = std::io::stdout();
    writeln!(out, "{}: {crops} crops", args.output.display())?;
    if skipped > 0 {
        writeln!(out, "{skipped} faces were left out")?;
    }
    Ok(())
}

/// Gives each face the name of its crop; no two may have the same.
fn name_crops(pictures: Vec<Picture>, beside: &Path) -> anyhow::Result<Vec<Face>> {
    let mut of_photograph: HashMap<PathBuf, u32> = HashMap::new();
    let mut named: HashMap<PathBuf, PathBuf> = HashMap::new();
    let mut faces = Vec::with_capacity(pictures.len());
    for picture in pictures {
        let Some(place) = picture.face else {
            continue;
        };
        let number = of_photograph.entry(picture.path.clone()).or_default();
        *number += 1;
        let crop = crop_name(&picture.path, beside, *number);
        if let Some(other) = named.insert(crop.clone(), picture.path.clone()) {
            let message = format!(
                "{} and {} would both become {}",
                other.display(),
                picture.path.display(),
                crop.display()
            );
            return Err(Failure::new(ExitCode::Failed, message)
                .hint("give the photographs different names, or name them relative to the list")
                .into());
        }
        faces.push(Face {
            photograph: picture.path,
            place,
            crop,
        });
    }
    Ok(faces)
}

/// The photograph's place relative to the list; of one that lies elsewhere its folder and name.
fn crop_name(photograph: &Path, beside: &Path, number: u32) -> PathBuf {
    let inside = |path: &Path| {
        path.components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
    };
    let relative = match photograph.strip_prefix(beside) {
        Ok(relative) if inside(relative) => relative.to_owned(),
        _ if inside(photograph) => photograph.to_owned(),
        _ => {
            let folder = photograph.parent().and_then(Path::file_name).unwrap_or_default();
            Path::new(folder).join(photograph.file_name().unwrap_or_default())
        }
    };
    let mut name = match relative.file_stem() {
        Some(stem) => stem.to_os_string(),
        None => OsString::from("face"),
    };
    if number > 1 {
        name.push(format!("_{number}"));
    }
    name.push(".jpg");
    relative.with_file_name(name)
}

/// What to do about a photograph of which there is no crop.
const LEAVE_OUT: &str = "take the photograph out of the list, or leave it out with --skip-damaged";
/// The same where its landmarks are to blame.
const IN_PIXELS: &str =
    "landmarks are pixels of the photograph as it is stored; --skip-damaged leaves such faces out";

/// A crop as JPEG.
fn cut(face: &Face, quality: u8) -> Result<Vec<u8>, Failure> {
    let refuse = |message: String, hint: &str| {
        let message = format!("{}: {message}", face.photograph.display());
        Failure::new(ExitCode::Failed, message).hint(hint)
    };
    let bytes = read_image_file(&face.photograph)?;
    let photograph = decode::decode_any(&bytes).map_err(|what| refuse(what, LEAVE_OUT))?;
    let mut pixels = [0; PIXEL_BYTES];
    let cut = face.place.cut(&photograph, &mut pixels);
    cut.map_err(|what| refuse(what, IN_PIXELS))?;
    let side = SIDE as u32;
    let crop = RgbImage::from_raw(side, side, pixels.to_vec())
        .ok_or_else(|| refuse("the crop has another size".into(), LEAVE_OUT))?;
    recode::encode(&crop, quality).map_err(|refused| refuse(refused.message, LEAVE_OUT))
}

/// Crops that were made, and faces that were left out.
type Counts = (u64, u64);

/// The folder gets its name when all crops are in it.
fn to_folder(args: &AlignArgs, faces: &[Face]) -> anyhow::Result<Counts> {
    let is_empty = |folder: &Path| fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none());
    if args.output.exists() && !is_empty(&args.output) {
        let message = format!("{} is there already", args.output.display());
        return Err(Failure::new(ExitCode::Usage, message)
            .hint("name a folder that is not there yet: crops are not mixed with other files")
            .into());
    }
    let parent = match args.output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    // Removed where something fails; beside the output, so that it can be renamed.
    let work = tempfile::Builder::new()
        .prefix(".align-")
        .tempdir_in(parent)
        .with_context(|| format!("create a folder in {}", parent.display()))?;
    let bar = progress::bar(faces.len() as u64, "aligning");
    let made: Vec<bool> = faces
        .par_iter()
        .map(|face| -> anyhow::Result<bool> {
            bar.inc(1);
            let crop = match cut(face, args.quality) {
                Ok(crop) => crop,
                Err(_) if args.skip_damaged => return Ok(false),
                Err(told) => return Err(told.into()),
            };
            let path = work.path().join(&face.crop);
            let folder = path.parent().unwrap_or(work.path());
            fs::create_dir_all(folder)
                .and_then(|()| fs::write(&path, crop))
                .with_context(|| format!("write {}", path.display()))?;
            Ok(true)
        })
        .collect::<anyhow::Result<_>>()?;
    bar.finish_and_clear();
    let crops = made.iter().filter(|made| **made).count() as u64;
    // The crops are on the disk before the folder has its name.
    nix::unistd::sync();
    let work = work.keep();
    set_mode(&work)
        .and_then(|()| fs::rename(&work, &args.output))
        .inspect_err(|_| fs::remove_dir_all(&work).unwrap_or_default())
        .with_context(|| format!("rename to {}", args.output.display()))?;
    Ok((crops, faces.len() as u64 - crops))
}

/// Temporary folders are for their owner alone; this one is no longer temporary.
fn set_mode(folder: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder, fs::Permissions::from_mode(0o755))
}

fn to_set(args: &AlignArgs, faces: &[Face]) -> anyhow::Result<Counts> {
    let mut by_folder: BTreeMap<&Path, Vec<&Face>> = BTreeMap::new();
    for face in faces {
        let folder = face.crop.parent().unwrap_or(Path::new(""));
        by_folder.entry(folder).or_default().push(face);
    }
    if by_folder.contains_key(Path::new("")) {
        let message = format!(
            "{}: photographs lie in no folder of their own",
            args.landmarks.display()
        );
        return Err(Failure::new(ExitCode::Failed, message)
            .hint("for a .rec each folder is an identity: put each person's photographs into one")
            .into());
    }
    let names: Vec<String> = by_folder
        .keys()
        .map(|folder| folder.to_string_lossy().into_owned())
        .collect();
    check_names(&names)?;
    new_file(&args.output, args.force, &[])?;
    if let Some(parent) = args.output.parent() {
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    }
    let items: Vec<(u32, &Face)> = (0u32..)
        .zip(by_folder.values())
        .flat_map(|(label, faces)| faces.iter().map(move |face| (label, *face)))
        .collect();
    let mut writer = LayoutWriter::open_ended(&args.output).map_err(explain)?;
    let bar = progress::bar(items.len() as u64, "aligning");
    let mut skipped = 0;
    let labels = repack::make(
        &items,
        Vec::new(),
        |item| item.0,
        |item| cut(item.1, args.quality),
        &mut |_, told: Failure| match args.skip_damaged {
            true => {
                skipped += 1;
                Ok(())
            }
            false => Err(told),
        },
        &mut writer,
        &mut |images, _| {
            bar.inc(images);
            Ok(())
        },
    )?;
    let kept: Vec<String> = labels
        .iter()
        .map(|&label| names[label as usize].clone())
        .collect();
    let crops = writer.images();
    repack::finish(writer, &args.output, Some(&kept)).map_err(explain)?;
    bar.finish_and_clear();
    Ok((crops, skipped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_are_named_by_their_place() {
        let beside = Path::new("/photographs");
        for (photograph, number, expected) in [
            ("/photographs/ann lee/1.png", 1, "ann lee/1.jpg"),
            ("/photographs/ann/1.b.jpeg", 2, "ann/1.b_2.jpg"),
            ("/elsewhere/bob/7.jpg", 1, "bob/7.jpg"),
            ("bob/7.jpg", 1, "bob/7.jpg"),
            ("../bob/7.jpg", 1, "bob/7.jpg"),
        ] {
            let found = crop_name(Path::new(photograph), beside, number);
            assert_eq!(found, Path::new(expected), "{photograph}");
        }
    }
}
