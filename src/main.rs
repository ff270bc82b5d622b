//! The program: reads the command line and the settings, and does what it says.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use lorasmith::allocator::{self, LargeBlocks};
use lorasmith::bench::{self, BenchOptions, Moment};
use lorasmith::cli::{BenchArgs, Cli, Command, DemoArgs, DoctorArgs, OpenapiVersion, VerifyArgs};
use lorasmith::config::{Config, Overrides};
use lorasmith::datasets::trial;
use lorasmith::demo::{self, DemoOptions};
use lorasmith::doctor::{self, DoctorOptions};
use lorasmith::plugin_host::PluginHost;
use lorasmith::runs::{STORAGE_FULL, WorkerEnd};
use lorasmith::selfcheck::Remembered;
use lorasmith::training::ComputePrecision;
use lorasmith::verify::{self, VerifyOptions};
use lorasmith::{api, app, key_commands, listing, lora_commands, telemetry};

/// The mascot counts as learned when the held-out loss has fallen to at most this part of the base's.
const LEARNED: f64 = 0.5;

#[global_allocator]
static ALLOCATOR: LargeBlocks = LargeBlocks;

fn main() -> Result<ExitCode> {
    let process_start = Moment::process_start();
    let cli = Cli::parse();
    telemetry::init(match cli.command {
        Command::Serve(_) | Command::Worker(_) => "info",
        _ => "warn",
    });
    let load = |overrides: Overrides| Config::load(cli.config.as_deref(), &overrides);
    match cli.command {
        Command::Serve(args) => {
            app::serve(load(args.into())?)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Keys(args) => {
            let overrides = Overrides {
                data_dir: args.data_dir.clone(),
                ..Overrides::default()
            };
            print!("{}", key_commands::run(&args, load(overrides)?)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Worker(args) => {
            allocator::keep_all();
            let end = app::work(load(Overrides::default())?, args.run)?;
            Ok(match end {
                WorkerEnd::Failed => ExitCode::FAILURE,
                WorkerEnd::StorageFull => ExitCode::from(STORAGE_FULL),
                WorkerEnd::Succeeded
                | WorkerEnd::Cancelled
                | WorkerEnd::NotOurs
                | WorkerEnd::Paused
                | WorkerEnd::Released => ExitCode::SUCCESS,
            })
        }
        Command::Demo(args) => run_demo(args),
        Command::Verify(args) => run_verify(&args),
        Command::Bench(args) => {
            allocator::keep_all();
            let plugins = app::find_plugins(&load(Overrides::default())?);
            run_bench(&args, &plugins, process_start)
        }
        Command::LoraOutput(args) => {
            verify::lora_output(&args.base, &args.lora, &args.output)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Lora(args) => {
            print!("{}", lora_commands::run(&args)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Plugins(args) => {
            let host = app::find_plugins(&load(Overrides::default())?);
            print!("{}", listing::plugins(&host, args.json)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Devices(args) => {
            print!("{}", listing::devices(args.json)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Doctor(args) => {
            let overrides = Overrides {
                data_dir: args.data_dir.clone(),
                ..Overrides::default()
            };
            run_doctor(&args, &load(overrides)?)
        }
        Command::Openapi(args) => {
            let document = match args.spec {
                OpenapiVersion::V3_1 => api::openapi().to_pretty_json()?,
                OpenapiVersion::V3_0 => serde_json::to_string_pretty(&api::openapi30())?,
            };
            println!("{document}");
            Ok(ExitCode::SUCCESS)
        }
        Command::ExaminePicture(args) => {
            println!("{}", trial::answer(&args.path, args.pixels));
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run_demo(args: DemoArgs) -> Result<ExitCode> {
    let report = demo::run(&DemoOptions {
        output: args.output,
        assets: args.assets,
        steps: args.steps,
        device: args.device,
        quiet: false,
    })?;
    println!("{report}");
    Ok(if report.ratio() <= LEARNED {
        ExitCode::SUCCESS
    } else {
        println!("The mascot was not learned: expected at most {LEARNED}. More --steps help.");
        ExitCode::FAILURE
    })
}

fn run_verify(args: &VerifyArgs) -> Result<ExitCode> {
    let config = Config::load(None, &Overrides::default())?;
    let plugins = app::find_plugins(&config);
    let report = verify::run(
        &VerifyOptions {
            fixture: args.fixture.clone(),
            device: args.device.parse()?,
            quick: args.quick,
            precision: ComputePrecision::from(args.precision).into(),
        },
        &plugins,
    )
    .with_context(|| format!("verifying {}", args.fixture.display()))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(if report.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_doctor(args: &DoctorArgs, config: &Config) -> Result<ExitCode> {
    let options = DoctorOptions {
        device: args.device.as_deref().map(str::parse).transpose()?,
        again: args.again,
    };
    let self_checks = Remembered::new(&config.data_dir);
    let found = doctor::examine(&options, &self_checks, |device, checks| {
        eprintln!(
            "checking {} ({}): {checks} checks …",
            device.id, device.name
        );
    })?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        print!("{found}");
    }
    Ok(if found.passed() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_bench(args: &BenchArgs, plugins: &PluginHost, process_start: Moment) -> Result<ExitCode> {
    let options = BenchOptions {
        family: args.family.into(),
        model: args.model(),
        resolution_px: args.resolution,
        batch_size: args.batch_size as usize,
        steps: args.steps as usize,
        network_kind: args.network_kind.into(),
        rank: args.rank as usize,
        unet_only: args.unet_only,
        gradient_checkpointing: args.gradient_checkpointing.into(),
        precision: args.precision.into(),
        optimizer: args.optimizer.clone(),
        device: args.device.parse()?,
    };
    let report = bench::run(&options, plugins, process_start)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::SUCCESS)
}
