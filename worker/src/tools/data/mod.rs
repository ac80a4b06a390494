//! `arcface-worker data`: looks at, checks, makes and converts data sets. One file a subcommand.

mod align;
mod bin;
mod clean;
mod filter;
mod inspect;
mod merge;
mod pack;
mod progress;
mod shuffle;
mod source;
mod synth;
mod verify;

/// Arguments of `data`.
#[derive(clap::Args, Debug)]
pub struct DataArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Says what a data set holds: images, identities, sizes.
    Inspect(inspect::InspectArgs),
    /// Decodes every record and lists the damaged ones; exits with 1 if there are any.
    Verify(verify::VerifyArgs),
    /// Packs an image folder, or a list of images, into train.rec and train.idx.
    Pack(pack::PackArgs),
    /// Copies a train.rec with its records in random order, for disks that read slowly at random.
    Shuffle(shuffle::ShuffleArgs),
    /// Drops images that a trained head finds far from their identity, the second half of sub-centre ArcFace.
    Clean(clean::CleanArgs),
    /// Joins several sets, each with identities of its own.
    Merge(merge::MergeArgs),
    /// Copies a part of a set: identities by name, number of images or chance, without damaged or doubled images.
    Filter(filter::FilterArgs),
    /// Cuts faces out of photographs by their landmarks, as the networks want them.
    Align(align::AlignArgs),
    /// Makes a verification set (.bin) from a list of pairs.
    Bin(bin::BinArgs),
    /// Draws synthetic identities: train.rec, train.idx and a verification set of other identities.
    Synth(synth::SynthArgs),
}

/// How a report is printed.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    /// Lines for people.
    Table,
    /// One JSON object.
    Json,
}

/// Runs `data`.
pub fn run(args: DataArgs) -> anyhow::Result<()> {
    match args.command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Pack(args) => pack::run(&args),
        Command::Shuffle(args) => shuffle::run(&args),
        Command::Clean(args) => clean::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Filter(args) => filter::run(&args),
        Command::Align(args) => align::run(&args),
        Command::Bin(args) => bin::run(&args),
        Command::Synth(args) => synth::run(&args),
    }
}
