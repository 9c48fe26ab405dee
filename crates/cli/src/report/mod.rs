//! The report: one self-contained HTML page made from `results.json`. Rows become sections ([`sections`], [`studies`]) of texts,
//! tables and SVG charts ([`charts`]); `page.html` lays them out and escapes what is not markup.

mod axis;
mod charts;
mod format;
mod kernels;
mod model;
mod page;
mod quality;
mod sections;
mod studies;
mod summary;
mod svg;

#[cfg(test)]
mod sample;
#[cfg(test)]
mod tests;

use minijinja::Environment;
use minijinja::value::Serde;

use crate::bench::record::Results;

use page::{Page, Section};
use sections::Run;

pub use format::{gflops, rate_unit};
pub use sections::varied;

/// Stands near the start of every report.
pub const MARK: &str = "<title>Lawson: when fusing pays</title>";

const TEMPLATE: &str = include_str!("page.html");
const CSS: &str = include_str!("page.css");

/// The report of one run, as the text of an HTML file that needs no other file.
pub fn render(results: &Results) -> String {
    let run = Run::new(results);
    let headline = summary::summary(results);
    let machine = &results.machine;
    let threads = machine.threads.map(|t| if t == 1 { "1 thread".to_owned() } else { format!("{t} threads") });
    let parts = [Some(machine.name.clone()), Some(machine.isa.clone()), threads, machine.date.as_deref().map(format::date)];
    let byline: Vec<String> = parts.into_iter().flatten().filter(|p| !p.is_empty()).collect();
    let mut sections: Vec<Section> = vec![sections::machine(machine), sections::block(&run), sections::length(&run)];
    sections.extend(studies::studies(&run));
    sections.push(kernels::kernels(&run));
    sections.push(quality::quality(&run));
    sections.extend([sections::roofline(&run), sections::steps(&run), sections::errors(&run), sections::method(&run)]);
    let page = Page {
        version: results.lawson.clone(),
        sentence: format::unbroken(&headline.sentence),
        about: headline.about,
        byline: byline.join(" · "),
        css: CSS,
        sections,
    };
    let mut environment = Environment::new();
    environment.add_template("page.html", TEMPLATE).expect("the template is part of the program and parses");
    let template = environment.get_template("page.html").expect("it was added above");
    template.render(Serde(&page)).expect("the page has every name that the template uses")
}
