//! The Rust mirror has the sizes and offsets that a C compiler gives the header.

use std::mem::{offset_of, size_of};
use std::process::Command;

use lorasmith_abi::{LsHost, LsOptimizer, LsParam, LsPlugin, LsReport, LsSchedule, LsStep, LsStr};

/// For each struct: its C name, its size, and the offset of each field in order.
macro_rules! layouts {
    ($($rust:ident = $c:literal { $($field:ident $(as $c_field:literal)?),* $(,)? })*) => {
        vec![$((
            $c,
            size_of::<$rust>(),
            vec![$((layouts!(@name $field $($c_field)?), offset_of!($rust, $field))),*],
        )),*]
    };
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $c_field:literal) => { $c_field };
}

type Layout = (&'static str, usize, Vec<(&'static str, usize)>);

fn rust_layouts() -> Vec<Layout> {
    layouts! {
        LsStr = "ls_str" { ptr, len }
        LsReport = "ls_report" { struct_size, reserved, ctx, fail, log }
        LsParam = "ls_param" { struct_size, id, name, value, grad, lr, weight_decay, reserved }
        LsStep = "ls_step" { struct_size, param_size, step, param_count, params }
        LsHost = "ls_host" {
            struct_size, reserved, ctx, add, sub, mul, div, pow, min, max, greater, add_scalar, sub_scalar,
            rsub_scalar, mul_scalar, div_scalar, rdiv_scalar, pow_scalar, greater_scalar, neg, abs, sign, sqrt,
            rsqrt, square, exp, log, clamp, where_ as "where", lerp, matmul, transpose, reshape, sum, mean,
            max_axis, dot, norm, shape, zeros, full, release, assign, state, assign_state, counter, set_counter,
            read_scalar, read, write, fail, log_message,
        }
        LsOptimizer = "ls_optimizer" {
            struct_size, flags, id, summary, settings_schema, create, step, destroy, eval,
        }
        LsSchedule = "ls_schedule" {
            struct_size, reserved, id, summary, settings_schema, create, factor, destroy,
        }
        LsPlugin = "ls_plugin" {
            struct_size, abi_major, abi_minor, reserved, id, version, license, optimizer_count, optimizers,
            schedule_count, schedules,
        }
    }
}

#[test]
fn the_mirror_has_the_layout_of_the_header() {
    let layouts = rust_layouts();
    let mut program = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"lorasmith_plugin.h\"\nint main(void) {\n",
    );
    let mut expected = String::new();
    for (name, size, fields) in &layouts {
        program += &format!("printf(\"{name} %zu\\n\", sizeof({name}));\n");
        expected += &format!("{name} {size}\n");
        for (field, offset) in fields {
            program += &format!("printf(\"{name}.{field} %zu\\n\", offsetof({name}, {field}));\n");
            expected += &format!("{name}.{field} {offset}\n");
        }
    }
    program += "return 0;\n}\n";

    for (compiler, standard, ending) in [("cc", "c11", "c"), ("c++", "c++17", "cc")] {
        let output = compile_and_run(&program, compiler, standard, ending);
        assert_eq!(output, expected, "{standard}");
    }
}

fn compile_and_run(program: &str, compiler: &str, standard: &str, ending: &str) -> String {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let source = folder.join(format!("layout.{ending}"));
    let binary = folder.join(format!("layout-{ending}"));
    std::fs::write(&source, program).unwrap();
    let built = Command::new(compiler)
        .arg(format!("-std={standard}"))
        .args(["-Wall", "-Wextra", "-pedantic", "-Werror", "-I"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/include"))
        .arg(&source)
        .arg("-o")
        .arg(&binary)
        .status()
        .unwrap_or_else(|error| panic!("a compiler called `{compiler}`: {error}"));
    assert!(built.success());
    let output = Command::new(&binary).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

/// What plugins are built with must stay: sizes and offsets of ABI 1.0 on 64-bit machines, and where 1.1 has grown.
#[test]
fn the_layout_of_released_versions_is_pinned() {
    let mut sizes: Vec<(&str, usize)> = Vec::new();
    for (name, size, fields) in rust_layouts() {
        sizes.push((name, size));
        let ascending = fields.windows(2).all(|pair| pair[0].1 < pair[1].1);
        assert!(ascending, "{name}");
    }
    assert_eq!(
        sizes,
        [
            ("ls_str", 16),
            ("ls_report", 32),
            ("ls_param", 56),
            ("ls_step", 32),
            ("ls_host", 408),
            ("ls_optimizer", 88),
            ("ls_schedule", 80),
            ("ls_plugin", 96),
        ]
    );
    assert_eq!(LsOptimizer::SIZE_1_0, 80);
    assert_eq!(offset_of!(LsHost, log_message), 400);
}
