"""What only the notebooks need: small problems that can be enumerated, and the figures for their sliders."""
