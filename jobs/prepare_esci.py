"""`python -m jobs.prepare_esci --source S --categories C --locale us --out O`: the published ESCI files as a catalogue."""

from catid2_ray.cli import run_prepare_esci

if __name__ == "__main__":
    run_prepare_esci()
