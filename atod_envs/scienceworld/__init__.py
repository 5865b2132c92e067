"""ScienceWorld: elementary-school science in a text world, played by the published simulator."""
