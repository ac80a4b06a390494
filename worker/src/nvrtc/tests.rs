//! Every kernel compiled for every architecture, without a GPU; and what becomes of damaged results and broken sources. The
//! compiler is the one that `scripts/setup.sh nvrtc` fetches and `ARCFACE_NVRTC` names; without it the tests say that they
//! are skipped, and fail with `CI` set.

use super::*;
use crate::kernels::{ALL, COMMON};
use rayon::prelude::*;
use std::{collections::BTreeSet, fs};

/// The compiler, or `None` where there is none and need not be.
fn compiler(cache: Option<&Path>) -> Option<Compiler> {
    let path = std::env::var_os("ARCFACE_NVRTC").filter(|path| Path::new(path).exists());
    if path.is_none() {
        let hint = "`scripts/setup.sh nvrtc` fetches it, `. scripts/env.sh` names it";
        assert!(
            std::env::var_os("CI").is_none(),
            "ARCFACE_NVRTC names no library: {hint}"
        );
        eprintln!("SKIPPED: kernels were not compiled: ARCFACE_NVRTC names no library ({hint})");
    }
    let cache = cache.map(|folder| Cache::new(folder.to_owned()));
    path.map(|path| Compiler::open(Some(Path::new(&path)), cache).expect("NVRTC loads"))
}

fn sources() -> Vec<Source<'static>> {
    let all = ALL.into_iter().flat_map(Source::of);
    all.map(|(source, _)| source).collect()
}

fn source(name: &str) -> Source<'static> {
    let mut all = sources().into_iter();
    all.find(|source| source.name == name).expect("there is one")
}

/// V100, A100, H100, B200. The machine code is ptxas' work, which refuses what does not fit a GPU.
#[test]
fn every_kernel_compiles_for_every_architecture() {
    let Some(compiler) = compiler(None) else { return };
    let archs = [(7, 0), (8, 0), (9, 0), (10, 0)].map(|(major, minor)| Arch::new(major, minor));
    let work: Vec<_> = archs
        .iter()
        .flat_map(|arch| sources().into_iter().map(|source| (*arch, source)))
        .collect();
    let found: Vec<(Arch, BTreeSet<String>, usize)> = work
        .into_par_iter()
        .map(|(arch, source)| {
            assert_eq!(compiler.target(arch).expect("a known one"), Target::Cubin(arch));
            let cubin = compiler
                .compile(&source, Target::Cubin(arch))
                .expect("it compiles");
            assert!(cubin.bytes.starts_with(b"\x7fELF") && !cubin.cached);
            let ptx = compiler.compile(&source, Target::Ptx(arch)).expect("it compiles");
            let text = String::from_utf8(ptx.bytes).expect("PTX is text");
            assert!(text.contains(&format!(".target {arch}")), "{arch}");
            assert!(text.ends_with('\0'));
            let entries = text.split(".entry ").skip(1);
            let names = entries.map(|rest| rest.split('(').next().unwrap_or("").trim().to_owned());
            (arch, names.collect(), cubin.bytes.len())
        })
        .collect();
    for arch in archs {
        let mut names = BTreeSet::new();
        let kernels: BTreeSet<&str> = ALL
            .into_iter()
            .flat_map(Source::of)
            .flat_map(|(_, names)| names)
            .copied()
            .collect();
        let mut bytes = 0;
        for (_, some, size) in found.iter().filter(|(of, _, _)| *of == arch) {
            names.extend(some.iter().map(String::as_str));
            bytes += size;
        }
        assert_eq!(names, kernels, "{arch}");
        println!("{arch}: {} kernels, {bytes} bytes of machine code", names.len());
    }
}

#[test]
fn results_are_kept_and_damaged_ones_compiled_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let kept = folder.path().join("deep/kernels");
    let Some(compiler) = compiler(Some(&kept)) else {
        return;
    };
    let update = source("update.cu");
    let target = Target::Cubin(Arch::new(9, 0));
    let fresh = compiler.compile(&update, target).expect("it compiles");
    assert!(!fresh.cached);
    let again = || compiler.compile(&update, target).expect("it compiles");
    let from_disk = Image {
        cached: true,
        ..fresh.clone()
    };
    assert_eq!(again(), from_disk);

    let file = kept.join(compiler.key(&update, &[target.option(), STANDARD.to_owned()], target));
    let whole = fs::read(&file).expect("the file of the result");
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    let mut other_version = whole.clone();
    other_version[MAGIC_VERSION] = b'2';
    for damage in [
        changed,
        other_version,
        whole[..whole.len() - 1].to_vec(),
        whole[..20].to_vec(),
        Vec::new(),
    ] {
        fs::write(&file, damage).expect("write");
        assert_eq!(again(), fresh, "compiled again");
        assert_eq!(again(), from_disk, "and kept");
    }
    assert_eq!(
        fs::read_dir(&kept).expect("the folder").count(),
        1,
        "nothing else is left"
    );

    // Everything that a result depends on is in its name.
    let options = |target: Target| [target.option(), STANDARD.to_owned()];
    let name = |source: &Source<'_>, target: Target| compiler.key(source, &options(target), target);
    let other = Source { text: "\n", ..update };
    let headers = [COMMON];
    let fewer = Source {
        headers: &headers,
        ..update
    };
    let names = BTreeSet::from([
        name(&update, target),
        name(&update, Target::Ptx(Arch::new(9, 0))),
        name(&update, Target::Cubin(Arch::new(8, 0))),
        name(&other, target),
        name(&fewer, target),
        compiler.key(&update, &[target.option()], target),
        Compiler {
            version: (13, 0),
            ..compiler_again()
        }
        .key(&update, &options(target), target),
    ]);
    assert_eq!(names.len(), 7);
}

/// Place of the version in a file.
const MAGIC_VERSION: usize = 15;

fn compiler_again() -> Compiler {
    compiler(None).expect("it was there a moment ago")
}

#[test]
fn a_folder_that_cannot_be_written_costs_time_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    fs::write(&file, b"in the way").expect("write");
    let Some(compiler) = compiler(Some(&file)) else {
        return;
    };
    for _ in 0..2 {
        let image = compiler
            .compile(&source("update.cu"), Target::Ptx(Arch::new(8, 0)))
            .expect("it compiles");
        assert!(!image.cached && !image.bytes.is_empty());
    }
}

#[test]
fn a_broken_source_is_named_with_the_compilers_words() {
    let Some(compiler) = compiler(None) else { return };
    let broken = Source {
        name: "broken.cu",
        text: "#include \"common.cuh\"\nKERNEL broken(float* x) {\n    x[0] = y;\n}\n",
        headers: &[COMMON],
    };
    let error = compiler
        .compile(&broken, Target::Ptx(Arch::new(9, 0)))
        .expect_err("y is nowhere");
    let text = error.to_string();
    assert!(
        !text.contains('\n') && text.contains("broken.cu does not compile for compute_90"),
        "{text}"
    );
    assert!(text.contains("\"y\" is undefined"), "{text}");
    let NvrtcError::Compile { log, .. } = error else {
        panic!("{error}")
    };
    assert!(log.contains("broken.cu(3)") && log.lines().count() > 2, "{log}");
    let zero = Source { text: "\0", ..broken };
    let error = compiler
        .compile(&zero, Target::Ptx(Arch::new(9, 0)))
        .expect_err("no text");
    assert_eq!(error.to_string(), "broken.cu has a zero byte in it");
}

#[test]
fn gpus_that_the_compiler_does_not_know_get_what_they_can_run() {
    let Some(compiler) = compiler(None) else { return };
    let of = |major, minor| compiler.target(Arch::new(major, minor));
    assert_eq!(of(9, 0).expect("H100"), Target::Cubin(Arch::new(9, 0)));
    // Newer than all, and between two that are known.
    let newest = of(99, 0).expect("any newer GPU");
    assert!(
        matches!(newest, Target::Ptx(arch) if arch >= Arch::new(12, 0)),
        "{newest}"
    );
    assert_eq!(
        of(8, 8).expect("between"),
        Target::Ptx(Arch::new(8, 7)).min_known(&compiler)
    );
    let error = of(3, 0).expect_err("Kepler").to_string();
    assert!(
        error.contains("not for sm_30") && !error.contains('\n'),
        "{error}"
    );
}

impl Target {
    /// The PTX of the newest architecture that is known and not above this one's.
    fn min_known(self, compiler: &Compiler) -> Self {
        let (Self::Ptx(arch) | Self::Cubin(arch)) = self;
        let known = compiler.library.architectures().expect("a list");
        let best = known.into_iter().map(Arch).filter(|one| *one <= arch).max();
        Self::Ptx(best.expect("an older one"))
    }
}

#[test]
fn a_library_that_is_not_there_is_an_error_in_one_line() {
    let error = Compiler::open(Some(Path::new("/nowhere/libnvrtc.so.13")), None);
    let text = error.err().expect("nothing is there").to_string();
    assert!(
        text.contains("/nowhere/libnvrtc.so.13") && !text.contains('\n'),
        "{text}"
    );
    // A library, but another one.
    let error = Compiler::open(Some(Path::new("libc.so.6")), None);
    let text = error.err().expect("libc compiles nothing").to_string();
    assert!(text.contains("nvrtcVersion"), "{text}");
}
