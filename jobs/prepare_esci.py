"""`python -m jobs.prepare_esci --source S --categories C --locale us --out O`: the published ESCI files as a catalogue."""

from catid2_ray.cli import prepare_esci, run_alone

if __name__ == "__main__":
    run_alone(prepare_esci)
