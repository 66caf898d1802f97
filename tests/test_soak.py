"A short run of the soak: broken oracles, data sets and studies are refused with their own errors."
import soak


def test_broken_files_are_refused(capsys):
    soak.main(400, seed=1)
    assert "oracle (universal): 400 broken files" in capsys.readouterr().out
