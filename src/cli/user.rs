//! `taffrail user`: makes a user of Kafka's protocol for the configuration, without keeping the password.

use std::io::{BufRead, IsTerminal, Write};

use super::CliResult;
use crate::broker::security::scram::{Hash, Verifier};

/// Characters of a password at least: what a verifier holds can be guessed at leisure by whoever reads the file.
const MIN_PASSWORD: usize = 8;

/// Make a [[kafka.user]] for the configuration
///
/// Reads the password from the terminal, twice, or from the first line of standard input, and prints what the
/// configuration needs: not the password, but what SCRAM keeps of it.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The user's name
    name: String,
}

/// Prints the table.
pub fn run(args: &Args) -> CliResult {
    let password = match std::io::stdin().is_terminal() {
        true => {
            let password = ask("Password: ")?;
            if ask("Again: ")? != password {
                return Err("the passwords differ: nothing was made".into());
            }
            password
        }
        false => line()?,
    };
    if password.chars().count() < MIN_PASSWORD {
        return Err(format!("a password has {MIN_PASSWORD} characters at least").into());
    }
    let name = toml::Value::String(args.name.clone());
    println!("[[kafka.user]]");
    println!("name = {name}");
    println!("scram = [");
    for hash in [Hash::Sha256, Hash::Sha512] {
        println!("    \"{}\",", Verifier::new(hash, &password));
    }
    println!("]");
    Ok(())
}

fn line() -> std::io::Result<String> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\n', '\r']).to_owned())
}

/// Asks on the terminal, which does not show the answer.
fn ask(question: &str) -> std::io::Result<String> {
    let mut out = std::io::stderr();
    write!(out, "{question}")?;
    out.flush()?;
    let quiet = Quiet::new();
    let answer = line();
    drop(quiet);
    writeln!(out)?;
    answer
}

/// The terminal of standard input without echo, until it is dropped.
struct Quiet(Option<libc::termios>);

impl Quiet {
    fn new() -> Self {
        // SAFETY: an all-zero termios is a valid value; tcgetattr fills it in or fails.
        let mut state: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: `state` lives through the call.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut state) } != 0 {
            return Self(None);
        }
        let mut quiet = state;
        quiet.c_lflag &= !libc::ECHO;
        // SAFETY: `quiet` is what tcgetattr gave, but for the echo.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, &raw const quiet) };
        Self(Some(state))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        if let Some(state) = &self.0 {
            // SAFETY: `state` is what tcgetattr gave.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, state) };
        }
    }
}
